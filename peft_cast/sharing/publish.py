"""Upload to the Hugging Face Hub: only what belongs to the artifact, and every failure one sentence with its remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from .artifacts import (
    BRIDGE_CONFIG_NAME,
    BRIDGE_WEIGHTS_NAME,
    METRICS_NAME,
    Artifact,
    Origin,
    describe_evaluation,
    read_artifact,
    write_metrics,
)
from .cards import write_card
from .licences import read_licence, read_licences


if TYPE_CHECKING:
    from ..evaluation import Evaluation

# Nothing else leaves the folder: it may also hold checkpoints, optimizer states, logs or credentials.
UPLOADED = [
    "README.md", CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, METRICS_NAME, BRIDGE_CONFIG_NAME, BRIDGE_WEIGHTS_NAME,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "LICENSE*", "NOTICE*", "*.png", "*.svg",
]  # fmt: skip
SUBFOLDERS = ["*/*"]


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
    the artifact, tokenizer, licence texts and pictures are uploaded; subfolders, optimizer states and anything else stay
    here. A warning says if no licence could be inherited, or if the target model is a folder that others do not have.

    Args:
        folder: What `save_pretrained` wrote. For adapters of another name than "default" the subfolder of that name.
        repo_id (`str`): `"user/name"`; the repository is made if there is none.
        private (`bool`, *optional*): Whether a new repository is private; the account's default when `None`. `True` also
            refuses to upload to an existing public one.
        token: Access token with write permission; the one of `hf auth login` or `HF_TOKEN` when `None`.
        revision (`str`, *optional*): Branch to commit to, made if there is none; `main` when `None`.
        commit_message (`str`, *optional*): Title of the commit.
        create_pr (`bool`): Open a pull request instead of committing to `main`.
        evaluation ([`Evaluation`], *optional*): What `evaluate` measured, for the card; it is kept in `cast_metrics.json`.
        evaluated_as (`str`, *optional*): The adapter's name in it, where several could be meant.

    Returns:
        `CommitInfo`: The commit (`oid`, `commit_url`, and `pr_url` of a pull request).

    Raises:
        ValueError: If the folder holds nothing of the three kinds, a name is invalid, options exclude each other or
            `private=True` meets a public repository.
        OSError: If the Hub refuses or cannot be reached. The message says what to do; the folder stays as it is.
    """
    folder = Path(folder)
    token = token.strip() if isinstance(token, str) else token  # a line break would put it into an error message
    check_ready(repo_id, token, revision, create_pr)
    artifact = read_artifact(folder)
    if evaluation is not None:
        artifact = _keep_evaluation(folder, artifact, evaluation, evaluated_as)
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        exposed = private and not api.model_info(repo_id).private
    if exposed:
        raise ValueError(
            f"'{repo_id}' exists and is public, so `private=True` cannot be kept: make it private in its settings on the Hub, "
            "or pass another `repo_id`."
        )
    _make_card(folder, artifact, repo_id, token, evaluation is not None)
    with _explained(repo_id):
        if revision not in (None, constants.DEFAULT_REVISION) and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or "Upload with peft-cast",
            create_pr=create_pr,
            allow_patterns=UPLOADED,
            ignore_patterns=list(SUBFOLDERS),
        )


def push_saved(save: Callable[[Path], Path], repo_id: str, **options) -> CommitInfo:
    """Publish what is in memory.

    Args:
        save: Saves it in a folder and returns where in it `push` finds it.
        repo_id, options: As in `push`.
    """
    # Saving a large bridge only to hear that there is no token would be a pity.
    check_ready(repo_id, options.get("token"), options.get("revision"), options.get("create_pr", False))
    with TemporaryDirectory() as folder:
        return push(save(Path(folder)), repo_id, **options)


class Publishable:
    """What can be pushed to the Hub with the measurements of `evaluate`, from memory."""

    def _save(self, folder: Path) -> Path:
        """Save all but the card, and return where in the folder `push` finds it."""
        raise NotImplementedError

    def push_to_hub(
        self,
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
        """Publish this with a model card; arguments, result and errors are those of `peft_cast.push`."""
        return push_saved(
            self._save, repo_id, private=private, token=token, revision=revision, commit_message=commit_message,
            create_pr=create_pr, evaluation=evaluation, evaluated_as=evaluated_as,
        )  # fmt: skip


def add_card(folder: Path, evaluation: Evaluation | None = None, evaluated_as: str | None = None) -> None:
    """Give a folder that was just saved its card; arguments and errors as in `push`."""
    artifact = read_artifact(folder)
    if evaluation is not None:
        artifact = _keep_evaluation(folder, artifact, evaluation, evaluated_as)
    write_card(folder, artifact, read_licences(artifact))


def _keep_evaluation(folder: Path, artifact: Artifact, evaluation: Evaluation, name: str | None) -> Artifact:
    """Write an evaluation into the folder's `cast_metrics.json`, and return the artifact with it.

    Raises:
        ValueError: For a bridge, or if it is not clear which of the evaluated adapters is meant.
    """
    if artifact.kind == "bridge":
        raise ValueError("A bridge is evaluated by the adapters it carries over: leave `evaluation` out.")
    write_metrics(folder, {**artifact.report, "evaluation": describe_evaluation(evaluation, name)})
    return read_artifact(folder)


def check_ready(repo_id: str, token: str | bool | None, revision: str | None = None, create_pr: bool = False) -> None:
    """Refuse before anything is saved or sent what cannot be published.

    Raises:
        ValueError: If the name is none, or `create_pr` comes with a `revision`.
        OSError: If there is no token, or the offline mode is on.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"'{repo_id}' cannot be the name of a repository: pass 'user/name', with letters, digits, '-', '_' and '.' alone."
        ) from error
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ValueError("A pull request is made against main: pass `create_pr=True` or `revision`, not both.")
    if constants.is_offline_mode():
        raise OSError("The offline mode is on (HF_HUB_OFFLINE=1): unset it and start again to publish.")
    if not (token if isinstance(token, str) else token is not False and get_token()):
        raise OSError(
            "Publishing needs a Hugging Face token with write permission and there is none: log in with `hf auth login`, set "
            "HF_TOKEN, or pass `token=`."
        )


def _make_card(folder: Path, artifact: Artifact, repo_id: str, token: str | bool | None, evaluated: bool) -> None:
    licences = read_licences(artifact, token)
    if not write_card(folder, artifact, licences, repo_id) and evaluated:
        warnings.warn(
            f"The README.md in '{folder}' is your own and is left as it is: add the evaluation yourself, or delete the file "
            "to have it written."
        )
    if licences.warning and not read_licence(Origin(str(folder))).known:  # its card states none either
        warnings.warn(licences.warning)
    target = artifact.origins["target"]
    if target.hub_id is None:
        warnings.warn(
            f"The target model is not named by a Hub id ('{target.label}'), so others will not find it: translate with the id, "
            "or say in README.md which model it is."
        )


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What goes wrong inside ends in one sentence."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise OSError(f"'{repo_id}' was not published: {_explain(error)}; the local files are unchanged.") from error


def _explain(error: BaseException) -> str:
    """The cause and the remedy. Messages of the HTTP client are left out: they may quote headers, the token among them."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError)):
        cause = cause.__cause__
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = f" ({' '.join(cause.server_message.split())})" if cause.server_message else ""
        if status == 401:
            return (
                f"the Hub does not accept the token (401){said}; make one with write permission at "
                "https://huggingface.co/settings/tokens, then pass it as `token=` or log in with `hf auth login`"
            )
        if status == 403:
            return f"the token may not write there (403){said}; use one with write permission, or your own name in `repo_id`"
        if status == 404:
            return (
                f"the Hub does not find it (404){said}; check `repo_id` and `revision`, and that the token may see it"
            )
        if status == 429 or status >= 500:
            return f"the Hub is busy or down ({status}){said}; call again later"
        return f"the Hub refused ({status}){said}; check `repo_id`, `revision` and README.md"
    if isinstance(cause, HTTPError):
        return (
            f"the connection failed ({type(cause).__name__}); check the network and call again, files that arrived are not "
            "sent twice"
        )
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = " ".join(str(root).split()).rstrip(".")
    return f"{type(root).__name__}{': ' if text else ''}{text}; mend that and call again"
