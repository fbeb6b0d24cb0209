"""Upload to the Hugging Face Hub: only what belongs to the artifact, and every failure one sentence with its
remedy.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..utils import write_json
from .artifacts import BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME, METRICS_NAME, Artifact, Origin, read_artifact
from .beside import FILES
from .cards import write_card
from .licenses import read_license, read_licenses
from .rows import Evaluation


# Nothing else leaves the folder: it may also hold checkpoints, optimizer states, logs or credentials.
UPLOADED = ["README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_NAME, BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME]
UPLOADED += ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json"]
UPLOADED += ["added_tokens.json", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*", "*.png", "*.svg"]
# What the Hub answered, and the remedy.
_BUSY = ("the Hub is busy or down", "call again later")
_REFUSED = ("the Hub refused", "check `repo_id`, `revision` and README.md")
_ANSWERS = {
    401: (
        "the Hub does not accept the token",
        "make one with write permission at https://huggingface.co/settings/tokens, then pass it as `token=` or log in "
        "with `hf auth login`",
    ),
    403: ("the token may not write there", "use one with write permission, or your own name in `repo_id`"),
    404: ("the Hub does not find it", "check `repo_id` and `revision`, and that the token may see it"),
    429: _BUSY,
}


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    evaluation: Evaluation | None = None,
    evaluated_as: str | None = None,
) -> CommitInfo:
    """Publish a saved CAST adapter, folded LoRA or bridge on the Hugging Face Hub.

    A model card is written to the folder first, unless it has one that you wrote or changed. The folder's own files of
    the artifact, tokenizer, license texts and pictures are uploaded, and the LoRA that was folded from it and lies
    beside it (`lora`, `lora.gguf`, `mlx`); other subfolders, optimizer states and anything else stay here. A warning
    says if no license could be inherited, or if the target model is a folder that others do not have.

    Args:
        folder: What `save_pretrained` wrote. For adapters of another name than "default" the subfolder of that name.
        repo_id (`str`): `"user/name"`; the repository is made if there is none.
        private (`bool`, *optional*): Whether a new repository is private; the account's default when `None`. `True`
            also refuses to upload to an existing public one.
        token: Access token with write permission; the one of `hf auth login` or `HF_TOKEN` when `None`.
        revision (`str`, *optional*): Branch to commit to, made if there is none; `main` when `None`.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`): Open a pull request instead of committing to `main`.
        evaluation ([`Evaluation`], *optional*): What `evaluate` measured, for the card; it is kept in
            `cast_metrics.json`.
        evaluated_as (`str`, *optional*): The adapter's name in it, where several could be meant.

    Returns:
        `CommitInfo`: The commit (`oid`, `commit_url`, and `pr_url` of a pull request).

    Raises:
        ValueError: If the folder holds nothing of the three kinds, or a LoRA that was folded from another adapter, a
            name is invalid, options exclude each other or `private=True` meets a public repository.
        OSError: If the Hub refuses or cannot be reached. The message says what to do; the folder stays as it is.
    """
    folder = Path(folder)
    token = token.strip() if isinstance(token, str) else token  # a line break would put it into an error message
    _check_ready(repo_id, token, revision, create_pr)
    artifact = _read(folder, evaluation, evaluated_as)
    if artifact.others:
        raise ValueError(
            f"'{artifact.others[0]}' in '{folder}' was not folded from the adapter as it is now: delete it, or fold "
            f"the adapter again with `peft-cast to-lora {folder} -o {folder / artifact.others[0]}`."
        )
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        exposed = private and not api.model_info(repo_id).private
    if exposed:
        raise ValueError(
            f"'{repo_id}' exists and is public, so `private=True` cannot be kept: make it private in its settings on "
            "the Hub, or pass another `repo_id`."
        )
    licenses = read_licenses(artifact, token)
    if not write_card(folder, artifact, licenses, repo_id) and evaluation is not None:
        warnings.warn(
            f"The README.md in '{folder}' is your own and is left as it is: add the evaluation yourself, or delete "
            "the file to have it written."
        )
    if licenses.warning and not read_license(Origin(str(folder))).known:  # its card states none either
        warnings.warn(licenses.warning)
    if (target := artifact.origins["target"]).hub_id is None:
        warnings.warn(
            f"The target model is not named by a Hub id ('{target.label}'), so others will not find it: translate "
            "with the id, or say in README.md which model it is."
        )
    with _explained(repo_id):
        if revision not in (None, constants.DEFAULT_REVISION) and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload with peft-cast",
            create_pr=create_pr,
            allow_patterns=[glob.escape(name) for name in _uploaded(folder, artifact)],
        )


def _uploaded(folder: Path, artifact: Artifact) -> list[str]:
    """The files that leave the folder; a pattern alone would match those of subfolders as well."""
    names = [file.name for file in folder.iterdir() if file.is_file()]
    own = [name for name in names if any(fnmatch(name, pattern) for pattern in UPLOADED)]
    return own + [file for name in artifact.beside for file in FILES[name]]


def push_saved(save: Callable[[Path], Path], repo_id: str, **options) -> CommitInfo:
    """Publish what `save` writes to a folder, in which it returns the place; further arguments are those of `push`."""
    # Saving a large bridge only to hear that there is no token would be a pity.
    _check_ready(repo_id, options.get("token"), options.get("revision"), options.get("create_pr", False))
    with TemporaryDirectory() as folder:
        return push(save(Path(folder)), repo_id, **options)


class Publishable:
    """What can be pushed to the Hub from memory."""

    def _save(self, folder: Path) -> Path:
        """Save all but the card, and return where in the folder `push` finds it."""
        raise NotImplementedError

    def push_to_hub(self, repo_id: str, **options: Any) -> CommitInfo:
        """Publish this with a model card; options, result and errors are those of `peft_cast.push`."""
        return push_saved(self._save, repo_id, **options)


def add_card(folder: Path, evaluation: Evaluation | None = None, evaluated_as: str | None = None) -> None:
    """Give a folder that was just saved its card; arguments and errors as in `push`."""
    artifact = _read(folder, evaluation, evaluated_as)
    write_card(folder, artifact, read_licenses(artifact))


def _read(folder: Path, evaluation: Evaluation | None, name: str | None) -> Artifact:
    """What a folder holds, after an evaluation of the adapter `name` was kept in its `cast_metrics.json`."""
    artifact = read_artifact(folder)
    if evaluation is None:
        return artifact
    if artifact.kind == "bridge":
        raise ValueError("A bridge is evaluated by the adapters it carries over: leave `evaluation` out.")
    kept = {"table": str(evaluation), "rows": [asdict(row) for row in evaluation.of(name)]}
    write_json({**artifact.report, "evaluation": kept}, folder / METRICS_NAME)
    return read_artifact(folder)


def _check_ready(repo_id: str, token: str | bool | None, revision: str | None = None, create_pr: bool = False) -> None:
    """Raise before anything is saved or sent what `push` would for these arguments."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' cannot be the name of a repository: pass 'user/name', with letters, digits, '-', '_' and "
            "'.' alone."
        ) from error
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError("A pull request is made against main: pass `create_pr=True` or `revision`, not both.")
    if constants.is_offline_mode():
        raise OSError("The offline mode is on (HF_HUB_OFFLINE=1): unset it and start again to publish.")
    if not (token if isinstance(token, str) else token is not False and get_token()):
        raise OSError(
            "Publishing needs a Hugging Face token with write permission and there is none: log in with `hf auth "
            "login`, set HF_TOKEN, or pass `token=`."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What goes wrong inside ends in one sentence."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise OSError(f"'{repo_id}' was not published: {_explain(error)}; the local files are unchanged.") from error


def _explain(error: BaseException) -> str:
    """The cause and the remedy. Messages of the HTTP client are left out: they may quote headers, the token among
    them.
    """
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    cause = next((one for one in causes if isinstance(one, HTTPError)), causes[-1])
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        what, remedy = _ANSWERS.get(status, _BUSY if status >= 500 else _REFUSED)
        said = f" ({' '.join(cause.server_message.split())})" if cause.server_message else ""
        return f"{what} ({status}){said}; {remedy}"
    if isinstance(cause, HTTPError):
        return (
            f"the connection failed ({type(cause).__name__}); check the network and call again, files that arrived "
            "are not sent twice"
        )
    text = " ".join(str(cause).split()).rstrip(".")
    return f"{type(cause).__name__}{': ' if text else ''}{text}; mend that and call again"
