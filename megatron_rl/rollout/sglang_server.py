"""One SGLang server: ``python -m megatron_rl.rollout.sglang_server <flags of sglang's own server>``.

The key that its clients must show comes by environment, because every user of a machine can read a command line:

    MEGATRON_RL_SERVER_KEY=... python -m megatron_rl.rollout.sglang_server --model-path ...

On a GPU SGLang spawns its scheduler and detokenizer, and ``spawn`` imports this module in each of them before anything else, so
the module body runs in every process of the server. Only the patches may happen here on import. On a CPU they are forked.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from typing import Any

from megatron_rl.process import heartbeat
from megatron_rl.process.lifetime import PARENT_VARIABLE, die_with_starter, see_current_folder
from megatron_rl.process.network import keep_gloo_on_loopback, socket_beside

KEY_VARIABLE = "MEGATRON_RL_SERVER_KEY"
MEETING_VARIABLE = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
"""SGLang's own: the URL by which a server's ranks meet. One of a file says that they are all on this machine."""


def _prepare() -> None:
    """Make this process of the server end with its parent, and make SGLang importable."""
    _tie()
    see_current_folder()
    if os.environ.get(MEETING_VARIABLE, "").startswith("file:"):
        keep_gloo_on_loopback()
    if key := os.environ.get(KEY_VARIABLE):
        _keep_out_of_logs(key)

    import torch

    from megatron_rl.patches import pytorch

    pytorch.apply()
    if not torch.cuda.is_available():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        from megatron_rl.patches import sglang

        sglang.apply_cpu()
        os.register_at_fork(after_in_child=_tie)


def _tie() -> None:
    """Let this process end with its parent, and its children with it; give signs of life."""
    die_with_starter()
    # Children inherit it and ask the kernel at once; SGLang asks too, but only after its imports, seconds later.
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    heartbeat.start()


def _keep_out_of_logs(secret: str) -> None:
    """Put stars in the place of a secret in all that is logged: SGLang logs its arguments at the start."""
    make = logging.getLogRecordFactory()

    def make_without(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        text = record.getMessage()
        if secret in text:
            record.msg, record.args = text.replace(secret, "***"), ()
        return record

    logging.setLogRecordFactory(make_without)


def _listen_beside_the_held_port() -> None:
    """Let uvicorn bind the port that the starter of this server holds for it."""
    import uvicorn

    serve = uvicorn.Server.serve

    async def serve_beside(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        await serve(self, sockets or [socket_beside(self.config.host, self.config.port)])

    uvicorn.Server.serve = serve_beside  # type: ignore[method-assign]


def main() -> None:
    """Serve until stopped. SGLang's own children end with this process."""
    from sglang.launch_server import run_server
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree
    from starlette.routing import WebSocketRoute

    key = os.environ.get(KEY_VARIABLE)
    # With one of its two keys alone SGLang leaves either the weights or everything else open.
    keys = ["--api-key", key, "--admin-api-key", key] if key else []
    # It asks for no key where a browser would open a socket, and nothing of ours does.
    app.router.routes[:] = [route for route in app.router.routes if not isinstance(route, WebSocketRoute)]
    _listen_beside_the_held_port()
    arguments = prepare_server_args([*sys.argv[1:], *keys])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ in ("__main__", "__mp_main__"):  # the server, or one of the processes that it spawned
    _prepare()

if __name__ == "__main__":
    main()
