"""Not a test: a Python that starts at once. It has imported what is slow to import and nothing of this repository, and
forks for each process that is asked for, which so is a fresh one in all but the seconds that importing torch takes.

Reads one JSON list a line, of {"argv", "cwd", "env", "out", "err", "timeout"}; argv is that of `python`: ["-c", code],
["-m", module, ...] or [script, ...]. They run together; the first that fails ends the others. Answers with their exit codes.
"""

import json
import os
import runpy
import signal
import sys

import pydantic.type_adapter  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import torchvision  # noqa: F401 - and torch._dynamo with it


def play(argv: list[str], cwd: str, env: dict[str, str], out: str, err: str, timeout: int) -> None:
    """In a fork: be `python argv`."""
    signal.alarm(timeout)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    option, *rest = argv
    given = env.get("PYTHONPATH")
    sys.path[:0] = [
        cwd if option in ("-c", "-m") else os.path.dirname(option),
        *(given.split(os.pathsep) if given else ()),
    ]
    if option == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(option, run_name="__main__")


def main() -> None:
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    del sys.path[0]  # this folder
    for line in sys.stdin:
        requests, running = json.loads(line), {}
        for i, request in enumerate(requests):
            pid = os.fork()
            if pid == 0:
                return play(**request)
            running[pid] = i
        codes = [0] * len(requests)
        while running:
            pid, status = os.wait()
            i = running.pop(pid)
            codes[i] = os.waitstatus_to_exitcode(status)
            for other in running if codes[i] else ():
                os.kill(other, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main()
