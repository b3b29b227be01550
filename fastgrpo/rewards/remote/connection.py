"""One POST: JSON there and JSON back, within a time and a size, to the address that was given and to no other.

The token is read from the environment each time, is sent in the one header, and is blotted out of whatever a server
answers before that is quoted.  Environment proxies are used for https, which they cannot read, never for http.
"""

import contextlib
import email.utils
import json
import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError as UrllibError

from fastgrpo.rewards.remote.errors import KEY, Refused, ServerFailed

_CHUNK = 1 << 16
_MAX_QUOTED = 200
_ASK_LATER = (408, 425, 429)
_BUSY = (429, 503)
# what a gateway says for a server that is not there yet
_NOBODY_BEHIND = (502, 503, 504)
_REMEDIES = {
    401: "put the server's token into the environment variable that token_env names",
    403: "put a token that may do this into the environment variable that token_env names",
    404: "correct the endpoint, or the name of the reward or model",
    413: "lower batch, or raise the server's limits",
    422: "let both ends keep to the same protocol",
}


@dataclass(frozen=True, kw_only=True)
class Connection:
    """``timeout_seconds`` bounds connecting, each wait for the answer to go on, and its whole body."""

    timeout_seconds: float
    max_answer_bytes: int
    token_env: str

    def __post_init__(self) -> None:
        read_token(self.token_env)

    def post(self, url: str, body: bytes) -> Any:
        """The parsed answer.  ServerFailed if a further attempt may help, Refused if not."""
        try:
            with requests.Session() as session:
                response = session.post(
                    url,
                    data=body,
                    headers={
                        "Content-Type": "application/json",
                        "Accept": "application/json",
                        # what is not compressed cannot swell
                        "Accept-Encoding": "identity",
                        "Connection": "close",
                    },
                    auth=_Bearer(read_token(self.token_env)),
                    timeout=self.timeout_seconds,
                    allow_redirects=False,
                    stream=True,
                    proxies={"http": ""},
                )
                with response:
                    return self._read(response)
        except requests.exceptions.Timeout as error:
            raise ServerFailed(f"no answer within {self.timeout_seconds:g} s") from error
        except (requests.exceptions.RequestException, UrllibError, OSError) as error:
            raise ServerFailed(self._blot(_root(error))) from error

    def knock(self, url: str, seconds: float) -> None:
        """ServerFailed unless somebody answers a GET; whatever that is, it needs no token."""
        try:
            with requests.Session() as session:
                response = session.get(
                    url,
                    headers={"Connection": "close"},
                    auth=_Bearer(""),
                    timeout=seconds,
                    allow_redirects=False,
                    stream=True,
                    proxies={"http": ""},
                )
                with response:
                    if response.status_code in _NOBODY_BEHIND:
                        raise ServerFailed(f"status {response.status_code}")
        except requests.exceptions.Timeout as error:
            raise ServerFailed("no answer") from error
        except (requests.exceptions.RequestException, UrllibError, OSError) as error:
            raise ServerFailed(_root(error)) from error

    def _read(self, response: requests.Response) -> Any:
        status = response.status_code
        if status in _ASK_LATER or status >= 500:
            rest_seconds = _rest_seconds(response.headers.get("Retry-After", ""))
            raise ServerFailed(self._describe(response), rest_seconds=rest_seconds, is_busy=status in _BUSY)
        if 300 <= status < 400:
            raise Refused(f"{self._describe(response)}; redirects are not followed: give the address itself")
        if status >= 400:
            remedy = _REMEDIES.get(status, "correct the endpoint")
            raise Refused(f"{self._describe(response)}; {remedy}")
        if status != 200:
            raise ServerFailed(self._describe(response))
        content = self._body(response, self.max_answer_bytes)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServerFailed(f"an answer that is not JSON: {self._quote(content)}") from error

    def _body(self, response: requests.Response, max_bytes: int) -> bytes:
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ServerFailed("a compressed answer, which was not asked for")
        deadline = time.monotonic() + self.timeout_seconds
        content = bytearray()
        # read1 returns what has come: a server that sends byte after byte cannot hold the request for ever
        while piece := response.raw.read1(_CHUNK, decode_content=False):
            content += piece
            if len(content) > max_bytes:
                raise ServerFailed(f"an answer of more than max_answer_bytes={max_bytes}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"an answer that is not complete after {self.timeout_seconds:g} s")
        return bytes(content)

    def _describe(self, response: requests.Response) -> str:
        """Status, and detail or the beginning of the body, which a server writes for people."""
        try:
            content = self._body(response, _CHUNK)
        except (ServerFailed, UrllibError, OSError):
            return f"status {response.status_code}, with a body that cannot be read"
        # a server in another framework has words of its own
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = json.loads(content)["detail"].encode()
        return f"status {response.status_code}: {self._quote(content)}"

    def _quote(self, content: bytes) -> str:
        text = " ".join(self._blot(content.decode("utf-8", "replace")).split())
        return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "...")

    def _blot(self, text: str) -> str:
        token = read_token(self.token_env)
        return text.replace(token, "[token]") if token else text


class _Bearer(requests.auth.AuthBase):
    """With it in place requests does not look for other credentials in ~/.netrc."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._token:
            request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def read_token(token_env: str) -> str:
    """The token in that environment variable, '' for no name; ValueError, which does not quote it, for a bad one."""
    if not token_env:
        return ""
    token = os.environ.get(token_env, "").strip()
    if not token:
        raise ValueError(f"the environment variable {token_env} holds no token; export it, or set token_env=''")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError(f"the token in {token_env} has characters that no HTTP header takes; make it plain ASCII")
    return token


def check_endpoint(url: str) -> str:
    """``url`` without a slash at its end; ValueError unless it is http(s)://host[:port][/path]."""
    parts = urlsplit(url)
    try:
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if parts.username is not None or parts.password is not None:
        # not quoted: what stands there is a secret
        raise ValueError(f"{KEY}.endpoints has an address with a user or a password in it; use token_env")
    if not is_good or parts.query or parts.fragment or url != "".join(url.split()):
        raise ValueError(f"{KEY}.endpoints has addresses like http://127.0.0.1:8000, got {url!r}")
    return url.rstrip("/")


def _rest_seconds(retry_after: str) -> float:
    """Retry-After, in seconds or as a date; 0 if it is neither."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _root(error: BaseException) -> str:
    """The innermost cause: what wraps it repeats the address several times over."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return f"{type(error).__name__}: {error}"
