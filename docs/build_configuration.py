"""Writes docs/configuration.md from the configuration classes themselves: `python docs/build_configuration.py`."""

from pathlib import Path

from central.config import CentralConfig
from edge.config import AgentConfig, GeneratorConfig, HostConfig, StdinConfig, TailConfig
from gateway.config import GatewayConfig
from gateway.policy import PolicyFile, RuleConfig
from sluice.config import Section, reference

OUTPUT = Path(__file__).with_name("configuration.md")
TABLES: tuple[tuple[str, str, type[Section]], ...] = (
    ("Agent", "`sluice edge --config FILE`", AgentConfig),
    ("Source `tail`", 'a `[[sources]]` table with `kind = "tail"`', TailConfig),
    ("Source `host`", 'a `[[sources]]` table with `kind = "host"`', HostConfig),
    ("Source `stdin`", 'a `[[sources]]` table with `kind = "stdin"`', StdinConfig),
    ("Source `generator`", 'a `[[sources]]` table with `kind = "generator"`', GeneratorConfig),
    ("Gateway", "`sluice gateway --config FILE`", GatewayConfig),
    ("Policy", "the file that `policy.file` names; `sluice policy check FILE`", PolicyFile),
    ("Policy rule", "a `[[rules]]` table of the policy", RuleConfig),
    ("Central", "`sluice central --config FILE`", CentralConfig),
)
HEAD = """# Configuration reference

Generated from the code by `make docs`; do not edit.

Each part reads one TOML file, then the environment: `SLUICE_` + the key in capitals, levels joined by two underscores
(`SLUICE_MQTT__HOST=broker` sets `mqtt.host`; a value that begins with `[` or `{` is read as TOML). An unknown key is an
error that names the nearest known one. `--check` validates a file and ends.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, where, kind in TABLES:
        rows = [
            f"| `{key}` | {type_} | {_cell(default)} | {_cell(text, code=False)} |"
            for key, type_, default, text in reference(kind)
        ]
        head = ["| key | type | default | |", "|---|---|---|---|"]
        parts.append("\n".join([f"\n## {title}\n", f"{where[0].upper()}{where[1:]}\n", *head, *rows]) + "\n")
    return "".join(parts)


def _cell(text: str, *, code: bool = True) -> str:
    short = text if len(text) <= 80 or not code else text[:77] + "..."
    safe = short.replace("|", "\\|").replace("\n", " ")
    return f"`{safe}`" if code and safe else safe


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
