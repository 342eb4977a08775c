"""A request that gets no answer, in OpenAI's error shape: what clients of that API know how to read.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

MOST_NAMES = 50  # of models that are there
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """Why a request is not answered. `param` is what has to change in it, `code` the machine's word for why."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's word for who has to act: the client (invalid_request_error and its like) or the server."""
        return TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def unsupported(param: str, message: str) -> Refusal:
    """Something OpenAI's API has and this server has not: never silence."""
    return Refusal(400, message, "unsupported_parameter", param)


def no_model(name: str, names: Iterable[str], param: str = "model") -> Refusal:
    """Nobody answers to this name. names: those who do."""
    says = f"The model {shown(name)} does not exist. The models here: {_listed(names)}."
    return Refusal(404, says, "model_not_found", param)


def no_router(names: Iterable[str]) -> Refusal:
    """`auto` where nobody chooses. names: of those who answer."""
    says = f"No run here has a router, so nothing chooses. The models here: {_listed(names)}."
    return Refusal(400, says, "unsupported_parameter", "model")


def stopping() -> Refusal:
    """The server is on its way out; another one may answer later."""
    return Refusal(503, "The server is stopping. Try again later.", "stopping", headers=_retry(10))


def queue_full(n_waiting: int, retry_after_s: int) -> Refusal:
    """No room to wait."""
    says = f"{n_waiting} requests are waiting already. Try again in {retry_after_s} s, or serve with a larger --queue."
    return Refusal(429, says, "queue_full", headers=_retry(retry_after_s))


def failed(request_id: str) -> Refusal:
    """Something broke inside; the id leads to the server's own log."""
    return Refusal(500, f"The server failed on this request. Its log says why under {request_id}.", "internal_error")


def shown(word: str) -> str:
    """A client's word as it may be repeated to it."""
    return repr(word if len(word) <= 80 else word[:80] + "…")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(islice(names, MOST_NAMES))


def _retry(seconds: int) -> dict[str, str]:
    return {"retry-after": str(seconds)}
