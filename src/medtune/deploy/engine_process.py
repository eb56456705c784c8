"""llama.cpp in a process of its own; `engine.Engine` starts this file and speaks with it over HTTP.

It imports nothing of the package, so that it starts at once and stays small. A line of JSON on
standard input says what to load; a line of JSON on standard output says where it listens. It ends
when standard input ends, which it does with the process that started it, however that dies.
"""

import json
import os
import sys
from typing import Any


def load(settings: dict[str, Any]) -> Any:
    """Start the server of llama.cpp.

    Parameters
    ----------
    settings : see `engine.Engine`, which writes them.
    """
    import xllamacpp  # an extra; `engine.Engine` has said so where it is missing

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.mmproj.path = settings["mmproj"]
    # clients need not know the folders of this machine
    params.model_alias = {settings["name"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings["key"]]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    if settings["image_max_tokens"]:
        params.image_min_tokens = settings["image_min_tokens"]
        params.image_max_tokens = settings["image_max_tokens"]
    params.use_jinja = True  # the template in the file, not the nearest of the built-in ones
    params.ui = False
    params.warmup = False
    params.verbosity = 0
    # nothing of one patient's question stays for the next
    params.cache_prompt = False
    params.cache_ram_mib = 0
    return xllamacpp.Server(params)


def main() -> None:
    """Serve until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    try:
        server = load(settings)
    except Exception as error:  # whatever llama.cpp says
        print(json.dumps({"error": str(error) or type(error).__name__}), flush=True)
        os._exit(1)
    print(json.dumps({"address": server.listening_address}), flush=True)
    sys.stdin.read()
    # the threads of the server know no other end
    os._exit(0)


if __name__ == "__main__":
    main()
