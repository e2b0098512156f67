"""The compose file, without a container engine: its schema, its paths and the configurations that it mounts."""

import re
from pathlib import Path

import compose_spec
import pytest
import yaml
from click.testing import CliRunner

from central.config import CentralConfig
from edge.config import AgentConfig, validate
from gateway.config import GatewayConfig
from gateway.policy_cli import policy
from sluice.config import Section, load

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
CONFIGS = ROOT / "deploy" / "config"
PARTS: dict[str, type[Section]] = {"edge": AgentConfig, "gateway": GatewayConfig, "central": CentralConfig}


def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


def test_compose_file_follows_the_specification() -> None:
    parsed = compose_spec.PyCompose.from_yaml(COMPOSE.read_text())
    for check in (parsed.validate, parsed.validate_networks, parsed.validate_volumes):
        check()
    assert set(parsed.service_names()) == {"mosquitto", "kafka", "gateway", "central", "agent"}


def test_the_check_would_find_a_misspelt_key() -> None:
    broken = COMPOSE.read_text().replace("healthcheck:", "healthchek:", 1)
    with pytest.raises(Exception, match="healthchek"):
        compose_spec.PyCompose.from_yaml(broken).validate()


def test_gpu_overlay_names_services_that_exist() -> None:
    overlay = yaml.safe_load((ROOT / "deploy" / "docker-compose.gpu.yml").read_text())
    assert set(overlay["services"]) <= set(compose()["services"])
    for service in overlay["services"].values():
        assert service["build"]["target"] == "gpu"


def test_every_mounted_file_and_dockerfile_exists_and_has_its_stage() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).is_file(), source
        if build := service.get("build"):
            text = (ROOT / build["dockerfile"]).read_text()
            assert "target" not in build or re.search(rf"AS {build['target']}$", text, re.MULTILINE)


def test_every_service_has_a_health_check() -> None:
    for name, service in compose()["services"].items():
        dockerfile = service.get("build", {}).get("dockerfile")
        assert "healthcheck" in service or (dockerfile and "HEALTHCHECK" in (ROOT / dockerfile).read_text()), name


def test_our_services_run_without_privileges() -> None:
    for name in ("gateway", "central", "agent"):
        service = compose()["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        dockerfile = (ROOT / service["build"]["dockerfile"]).read_text()
        assert re.search(r"^USER sluice$", dockerfile, re.MULTILINE)


def test_nothing_is_published_beyond_loopback() -> None:
    for service in compose()["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


@pytest.mark.parametrize("part", PARTS)
def test_example_configuration_is_valid_with_the_environment_of_its_image(part: str) -> None:
    dockerfile = (ROOT / "deploy" / f"{part}.Dockerfile").read_text()
    environ = dict(re.findall(r"(SLUICE_\w+)=(\S+)", dockerfile))
    assert environ, "the image sets its probe's address"
    config = load(PARTS[part], CONFIGS / f"{part}.toml", environ)
    assert config.telemetry.port is not None  # type: ignore[attr-defined]
    assert f"http://127.0.0.1:{config.telemetry.port}/readyz" in dockerfile  # type: ignore[attr-defined]
    if isinstance(config, AgentConfig):
        validate(config)


def test_state_of_every_part_lies_on_its_volume() -> None:
    for text in (path.read_text() for path in CONFIGS.glob("*.toml")):
        for directory in re.findall(r'^(?:directory|uri|state_dir) = "([^"]+)"', text, re.MULTILINE):
            assert directory.startswith("/var/lib/sluice/")


def test_example_policy_compiles() -> None:
    done = CliRunner().invoke(policy, ["check", str(CONFIGS / "policy.toml")])
    assert done.exit_code == 0, done.output
