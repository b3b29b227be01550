"""``fastgrpo serve-reward``: the rewards of a config for runs on other machines, over ``rewards/remote/wire.py``."""

import dataclasses
import ipaddress
import signal
import socket
from typing import Any

from omegaconf import DictConfig

from fastgrpo.memory.device import device_of
from fastgrpo.parts import build_rewards, read_runtime
from fastgrpo.rewards.remote.connection import read_token
from fastgrpo.rewards.remote.limits import Limits

UVICORN: dict[str, Any] = {
    "http": "h11",
    "ws": "none",
    "lifespan": "off",
    "log_level": "warning",
    "access_log": False,
    "server_header": False,
    "proxy_headers": False,
    # open connections, whoever holds them; the protocol's own limit is max_requests
    "limit_concurrency": 512,
    "timeout_graceful_shutdown": 10,
}


def serve_reward(config: DictConfig) -> None:
    """Serve every reward of a checked ``serve-reward`` config, tried on golden pairs, until SIGTERM or SIGINT.

    A failure of the GPU ends it, by that, so that what started it may start it anew.
    """
    try:
        import uvicorn

        from fastgrpo.rewards.remote.server import RewardServer
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "fastapi"):
            raise
        raise ValueError(f"serve-reward needs {error.name}; install it with pip install 'fastgrpo[serve]'") from error
    token = read_token(config.token_env)
    limits = Limits(**config.limits)
    # who asks while weights are loaded waits
    with _listen(config.host, config.port, has_token=bool(token)) as listener:
        rewards, _ = build_rewards(config)
        failures: list[Exception] = []

        def give_up(error: Exception) -> None:
            failures.append(error)
            runner.should_exit = True

        server = RewardServer(
            rewards=rewards.all,
            # a client asks again by itself
            scoring=dataclasses.replace(rewards.scoring, retries=0),
            limits=limits,
            device=device_of(read_runtime(config)),
            token=token,
            on_device_error=give_up,
        )
        runner = uvicorn.Server(uvicorn.Config(server.app(), **UVICORN))
        print(f"serving {', '.join(rewards.all)} on {_address(listener)}, {_who(config.token_env)}", flush=True)
        # uvicorn raises the signal that ended it once more, for those who were there before it
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        try:
            runner.run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)
    if failures:
        raise failures[0]


def _listen(host: str, port: int, *, has_token: bool) -> socket.socket:
    """A socket that listens; ValueError where anyone could ask, or nobody can."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port must lie in 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
        # judged by the address that is bound, not by its name
        if not has_token and not ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback:
            raise ValueError(
                f"host={host} can be reached from other machines; export a token and give the variable's name as "
                "token_env=NAME, or use host=127.0.0.1"
            )
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot listen on {host} port {port} ({why}); give host= or port= another") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _who(token_env: str) -> str:
    return f"to who has the token in {token_env}" if token_env else "to anyone on this machine"
