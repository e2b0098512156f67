"""Which files count, and which are merged: pure decisions on names."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.sealed_files import SealedFile, expired, merged, plan_merge, visible

KIB = 1024


def neighbours(sizes: list[int], step_ms: int = 1000) -> list[SealedFile]:
    return [SealedFile(i, i, i * step_ms, i * step_ms, 10, size) for i, size in enumerate(sizes)]


@given(st.tuples(*[st.integers(0, 10**13 - 1)] * 4), st.integers(0, 10**6))
def test_a_name_tells_everything(numbers: tuple[int, ...], rows: int) -> None:
    first, last, oldest, newest = numbers
    file = SealedFile(first, last, oldest, newest, rows)
    assert SealedFile.parse(file.name) == file
    assert SealedFile.parse(file.name + ".tmp") is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.data())
def test_leftovers_of_any_merges_do_not_count(cuts: list[int], data: st.DataObject) -> None:
    count = sum(cuts)
    files = neighbours([KIB] * count)
    kept: list[SealedFile] = []
    at = 0
    for size in cuts:
        group = files[at : at + size]
        kept.append(merged(group, 10 * size) if size > 1 else group[0])
        at += size
    leftovers = data.draw(st.lists(st.sampled_from(files), unique=True))
    leftovers = [f for f in leftovers if f not in kept]
    counting, gone = visible(data.draw(st.permutations([*kept, *leftovers])))
    assert counting == kept
    assert sorted(gone) == sorted(leftovers)


@given(
    st.lists(st.integers(1 * KIB, 300 * KIB), max_size=40),
    st.integers(2, 8),
    st.integers(32 * KIB, 1024 * KIB),
)
def test_a_plan_is_a_run_of_neighbours_within_the_limits(sizes: list[int], merge_files: int, rotate_bytes: int) -> None:
    files = neighbours(sizes)
    plan = list(plan_merge(files, merge_files=merge_files, rotate_bytes=rotate_bytes, rotate_ms=20_000))
    if not plan:
        return
    assert len(plan) >= merge_files
    assert plan == files[plan[0].first : plan[-1].last + 1]
    assert sum(f.size_bytes for f in plan) <= rotate_bytes
    assert plan[-1].newest_ms - plan[0].oldest_ms <= 20_000


@given(st.integers(40, 400))
def test_each_byte_is_rewritten_a_few_times_only(commits: int) -> None:
    files: list[SealedFile] = []
    rewritten = 0
    for i in range(commits):
        files.append(SealedFile(i, i, i, i, 10, 16 * KIB))
        while plan := plan_merge(files, merge_files=8, rotate_bytes=2**30, rotate_ms=10**9):
            size = sum(f.size_bytes for f in plan)
            rewritten += size
            new = merged(plan, 0)
            at = files.index(plan[0])
            files[at : at + len(plan)] = [SealedFile(new.first, new.last, new.oldest_ms, new.newest_ms, 0, size)]
    assert rewritten <= 4 * commits * 16 * KIB
    assert len(files) <= 32


def test_only_files_wholly_older_than_the_limit_expire() -> None:
    files = [SealedFile(0, 5, 0, 99, 1), SealedFile(6, 9, 50, 101, 1)]
    assert expired(files, 100) == files[:1]
