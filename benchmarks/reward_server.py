"""``fastgrpo serve-reward`` in a process of its own, which can be killed and started again on the same port."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


class Server:
    """Serves ``reward=shapes`` on loopback; what it says goes to ``log``."""

    def __init__(self, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self._log = log
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "fastgrpo.cli", "serve-reward", "reward=shapes", f"port={self.port}"]
        with open(self._log, "a") as log:
            self._process = subprocess.Popen([*words, "runtime.device=cpu"], stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"the server does not answer; its words are in {self._log}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
