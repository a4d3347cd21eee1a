"""vLLM's own server as a child that ends with its parent: `python -m tasks.engines.trl_engine.vllm_process serve …`."""

from __future__ import annotations

import sys

from tasks.titles.child_process import end_with_stdin

if __name__ == "__main__":
    end_with_stdin()
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
