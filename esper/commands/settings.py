"""`esper config` and `esper keys`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from esper.artifacts import SigningKey
from esper.commands.output import AsJson, print_facts, print_json
from esper.configs import ConfigError, load_config, unknown_variables
from esper.services.parts import data_folder, signing_key
from esper.variables import CONFIG_VARIABLE

__all__ = ["config_app", "keys_app"]

config_app = typer.Typer(no_args_is_help=True, help="The settings in force.")
keys_app = typer.Typer(no_args_is_help=True, help="The key that kernels are signed with here, and whom to trust.")


@config_app.command("show")
def show(as_json: AsJson = False) -> None:
    """Print all settings, defaults included; secrets are hidden."""
    values = json.loads(load_config().model_dump_json())
    if as_json:
        print_json(values)
    else:
        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


@config_app.command("check")
def check(
    file: Annotated[Path | None, typer.Argument(help="A file to check instead of the one in use.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the settings can be used; an error names the line, or the variable, also if nothing reads it."""
    if told := unknown_variables():
        raise ConfigError(told)
    load_config(file)
    used = file or os.environ.get(CONFIG_VARIABLE)
    if as_json:
        print_json({"ok": True, "file": None if used is None else str(used)})
    else:
        typer.echo(f"{used or 'the environment'}: the settings can be used")


@keys_app.command("show")
def show_key(as_json: AsJson = False) -> None:
    """Print the public key of this data folder, which is made if there is none yet."""
    config = load_config()
    _print_key(signing_key(config), data_folder(config), as_json)


@keys_app.command("new")
def new_key(folder: Annotated[Path, typer.Argument(help="Folder for signing.pem.")], as_json: AsJson = False) -> None:
    """Make a key for another machine. An existing one is never replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "signing.pem"
    if path.exists():
        raise typer.BadParameter(f"{path} exists; remove it first if nothing signed with it is needed any more")
    key = SigningKey.generate()
    key.save(path)
    _print_key(key, folder, as_json)


def _print_key(key: SigningKey, folder: Path, as_json: bool) -> None:
    facts = {"public_key": key.public_bytes.hex(), "key_id": key.key_id, "file": str(folder / "signing.pem")}
    if as_json:
        print_json(facts)
        return
    print_facts((name.replace("_", " "), value) for name, value in facts.items())
    typer.echo("others use kernels signed with it if platform.trusted_keys has the public key")
