"""What the Hub's refusals mean for somebody who writes to it, each in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from finedeep_files.errors import ConversionError, one_line
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from ..source import CARD

# What an HTTP status of the Hub means for somebody who pushes, and what to do.
REASONS = {
    401: "the token was refused; log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    402: "the account's storage is full; free some of it or enlarge it",
    403: "this token may not write there, or the storage quota is used up; use another token or free some storage",
    404: "there is no such repository or revision, or this token may not see it",
    409: "somebody else has changed the repository meanwhile; run the same command again",
    412: "somebody else has changed the repository meanwhile; run the same command again",
    413: "a file is larger than the Hub takes; convert with a smaller --max-shard-size",
    429: "too many requests; wait, then run the same command again",
}
AGAIN = "run the same command again: files that have arrived are not sent twice"


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Raise `ConversionError` for what the Hub, its client or the connection raise while `repo_id` is written."""
    try:
        yield
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise ConversionError(f"{repo_id}: {one_line(error)}") from error
    except HfHubHTTPError as error:
        raise ConversionError(_refusal(repo_id, error)) from error
    except Exception as error:
        if type(error) is ValueError and CARD in str(error):  # the client has the Hub check it before anything is sent
            raise ConversionError(f"the Hub refused the model card: {one_line(error)}") from error
        if not _is_of_the_network(error):
            raise
        raise ConversionError(
            f"the connection to the Hub broke while {repo_id} was being uploaded "
            f"({type(error).__name__}: {one_line(error)}); {AGAIN}."
        ) from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    said = getattr(error, "server_message", None) or str(error).strip().splitlines()[-1]
    meaning = REASONS.get(status, AGAIN)
    return f"the Hub refused to take {repo_id} (HTTP {status}: {one_line(said)}): {meaning}."


def _is_of_the_network(error: Exception) -> bool:
    """Whether an HTTP library raised it; which one, depends on the version of huggingface_hub."""
    cause: BaseException | None = error
    while cause is not None:
        modules = {kind.__module__.split(".")[0] for kind in type(cause).__mro__}
        if modules & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}:
            return True
        cause = cause.__cause__
    return isinstance(error, (ConnectionError, TimeoutError))
