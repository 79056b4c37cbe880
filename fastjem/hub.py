"""Hugging Face's hub, by its own library: files of a model are fetched, and a folder is sent there.

Whose the account is, that library knows: by `hf auth login`, or by a token in `HF_TOKEN`.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from fastjem.errors import UserError

PLACES = ("hf-hub:", "hf_hub:")  # as timm writes them, the second in its earlier versions
MOST = 300  # characters of an error
NOT_IN_REACH = "the hub can't be reached from here"


def is_there(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a model on the hub: "hf-hub:USER/MODEL", "hf-hub:USER/MODEL@REVISION"."""
    return isinstance(name, str) and name.startswith(PLACES)


@contextlib.contextmanager
def in_reach() -> Iterator[bool]:
    """Whether the hub can be reached. Where it can't, its cache alone is looked at: huggingface_hub would try for 70
    seconds, and say so in a dozen lines.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    reached = not offline
    if reached and not getproxies():  # a proxy looks addresses up itself
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            reached = False
    constants.HF_HUB_OFFLINE = not reached
    try:
        yield reached
    finally:
        constants.HF_HUB_OFFLINE = offline


def fetch(name: str, *files: str) -> Path:
    """The folder of the hub's cache in which these files of a model (see `is_there`) lie, once they do.

    Raises:
        UserError: where huggingface_hub is missing, the hub can't be reached and they aren't in its cache, or there is
            no such model or file.
    """
    hub = _library(name)
    model, _, revision = name.partition(":")[2].partition("@")
    folder = Path()
    with in_reach() as reached:
        for file in files:
            try:
                folder = Path(hub.hf_hub_download(model, file, revision=revision or None)).parent
            except Exception as error:  # whatever huggingface_hub and the network may raise
                why = f"{NOT_IN_REACH}, and they aren't in its cache" if not reached else said(error)
                raise UserError(f"the weights of {name} can't be had: {file}: {why}") from None
    return folder


def check(name: str) -> None:
    """What `send` needs, looked at before there is anything to send.

    Raises:
        UserError: for a name that isn't USER/MODEL, where huggingface_hub is missing, the hub can't be reached, nobody
            is logged in, or the hub doesn't know who is.
    """
    called = f"--push {name}"
    hub = _library(called)
    try:
        hub.utils.validate_repo_id(name)
        if not re.fullmatch("[^/]+/[^/]+", name):
            raise ValueError("it names nobody")
    except ValueError as error:
        raise UserError(f"{called} must be USER/MODEL, as on the hub: {said(error)}") from None
    with in_reach() as reached:
        if not reached:
            raise UserError(f"{called}: {NOT_IN_REACH}; without --push the folder is written, to be sent later")
        try:
            hub.HfApi().whoami()
        except hub.errors.LocalTokenNotFoundError:
            login = "`hf auth login` does that, or a token in the environment variable HF_TOKEN"
            raise UserError(f"{called}: nobody is logged in to the hub here; {login}") from None
        except Exception as error:
            raise UserError(f"{called}: the hub doesn't let us in: {said(error)}") from None


def send(folder: Path, name: str, *, private: bool = False, files: list[str]) -> str:
    """The address of a model on the hub that has these files of a folder now; it is made where it isn't there.

    Args:
        private: whether a model that is made is for its owner alone. One that is there stays as visible as it is.

    Raises:
        UserError: where the hub refuses it, or can't be reached any more.
    """
    hub = _library(f"--push {name}")
    api = hub.HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=files, commit_message="An encoder of fastjem"
        )
    except Exception as error:  # whatever huggingface_hub and the network may raise
        raise UserError(f"--push {name}: {said(error)}; the folder is in {folder}") from None
    return str(address)


def said(error: Exception) -> str:
    """What an error of the hub's says, in one line: the first of its lines has the number of an answer alone."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST else f"{text[:MOST]}..."


def _library(called: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        raise UserError(f"{called}: {error.name} is not installed; pip install huggingface_hub") from None
    return huggingface_hub


__all__ = ["NOT_IN_REACH", "check", "fetch", "in_reach", "is_there", "send"]
