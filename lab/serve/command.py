"""`lab serve`: opens the model, and answers over HTTP until it is interrupted."""

from __future__ import annotations

import ipaddress

from lab.errors import LabError, Unavailable, warn
from lab.options import model_arguments


def add_arguments(parser) -> None:
    model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: this machine only)"
    )
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="default 8000")
    parser.add_argument(
        "--batch", metavar="N", type=int, default=8, help="sequences that are decoded together (default 8)"
    )
    parser.add_argument(
        "--max-queue", metavar="N", type=int, default=256, help="requests at a time; more get status 429"
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=int, default=1024, help="most that a request may ask for"
    )
    parser.add_argument(
        "--max-body", metavar="BYTES", type=int, default=1 << 20, help="of a request (default 1 MiB)"
    )


def main(args) -> int:
    try:
        import uvicorn

        from lab.serve.app import Limits, make_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lab"):
            raise
        raise Unavailable(
            f"lab serve needs the package {error.name}: run `pip install starlette uvicorn`"
        ) from None
    from lab.model.opening import open_model
    from lab.serve.engine import Engine

    for option in ("max_queue", "max_new_tokens", "max_body"):
        if getattr(args, option) < 1:
            raise LabError(f"--{option.replace('_', '-')} {getattr(args, option)}: it must be at least 1")
    if not 1 <= args.port < 1 << 16:
        raise LabError(f"--port {args.port}: it must be from 1 to 65535")
    local = is_loopback(args.host)
    if not local:
        warn(f"--host {args.host}: other machines can use this server, and nothing asks who they are")
    opened = open_model(args, args.batch, needs_text=True)
    engine = Engine(opened, args.max_queue)
    engine.prepare()
    app = make_app(engine, Limits(args.max_new_tokens, args.max_body), hosts_of(args.host))
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        limit_concurrency=2 * args.max_queue + 64,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{opened.name} at http://{host}:{args.port}/v1 (Ctrl-C ends)", flush=True)
    with engine:
        try:
            server.run()
        except SystemExit:  # uvicorn has said why, such as a port in use
            return 2
    return 0


def hosts_of(host: str) -> list[str]:
    """The names by which a server that listens at `host` may be called; "*": by any.

    A web page that the user visits could call a server of this machine by a name of its own. An address is
    not such a name. Starlette compares what stands before the first colon: of http://[::1]:8000 that is "[".
    """
    if not is_loopback(host):
        return ["*"]
    return ["localhost", "127.0.0.1", host, *(["[", f"[{host}]"] if ":" in host else [])]


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
