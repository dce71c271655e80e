"""`python -m sparsecast.integrations.lm_eval`: lm-eval's command line with `--model sparsecast`.

lm-eval looks for models in a table of its own and reads no entry points, so `python -m lm_eval`
cannot find the class. This registers it first; everything else is lm-eval's.
"""

from __future__ import annotations

import sys

from sparsecast.core.errors import InputError
from sparsecast.integrations.lm_eval.run import require_lm_eval


def main() -> None:
    """Run lm-eval's command line; bad input to the model is one line and exit code 2."""
    try:
        require_lm_eval("python -m sparsecast.integrations.lm_eval")
        from lm_eval.__main__ import cli_evaluate

        import sparsecast.integrations.lm_eval.registered  # noqa: F401  # registers the model

        cli_evaluate()
    except InputError as error:
        sys.stderr.write(f"sparsecast: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
