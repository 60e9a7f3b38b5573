"""The one exception a user is meant to read, and what is to be said of some others."""

import errno
import re


class UserError(Exception):
    """Something the user can put right.

    The message is one sentence: what is wrong, what is allowed, what to do. The command line prints it
    without a traceback and exits with status 2. What it quotes, however odd, breaks no line and no terminal.
    """

    def __init__(self, sentence: str = ""):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(sentence))
        super().__init__(re.sub(r"\S{500,}", lambda word: f"{word[0][:80]}...", shown))


class LacksMemory(UserError):
    """There is too little memory for something."""


def lacks_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is for lack of memory: of the machine's or of a GPU's."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError | LacksMemory) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if any(words in str(error) for words in _NO_MEMORY):  # libraries have no type for it
            return True
        error = error.__cause__ or error.__context__
    return False


_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "unable to mmap", "out of memory", "OutOfMemoryError")
