"""An empty PostgreSQL for as long as stdin is open: `python -m tests.bench.postgres` prints {"url"}."""

import json
import sys

from tests.servers import postgres_server


def main() -> None:
    with postgres_server() as server:
        sys.stdout.write(json.dumps({"url": server.url}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
