"""What a fresh process computes with a model that it has loaded, whatever loaded it.

It is a file of its own so that programs that load models by something else than mlx_lm compute the
same. It imports nothing of this project.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

Logits = np.typing.NDArray[np.float32]
ROWS_AT_ONCE = 64  # rows of logits that are converted to float64 at a time


def answer_questions(reader: Any, asked: dict[str, Any]) -> dict[str, object]:
    """Compute what a request asks of one model. Keys of `asked`:

    texts: to be encoded; the tokenizer's digest is returned too.
    prompts, columns: the logits after each prompt, of these token ids; if empty, of some 256.
    rows: token ids, and the positions of those whose log-likelihoods are summed, in nats.
    questions: prompts to be answered greedily; the answers include the end-of-text token.
    done: a file that gets a byte for each row and question that is done; may be missing.
    """
    done: str | None = asked.get("done")
    return {
        "reader": reader.name,
        "factors": reader.factors(),
        "ends": reader.ends,
        "chat_template": reader.chat_template,
        "tokenizer": reader.tokenizer_digest() if asked["texts"] else None,
        "token_ids": [reader.encode(text) for text in asked["texts"]],
        "logits": [last_logits(reader, tokens, asked["columns"]) for tokens in asked["prompts"]],
        "likelihoods": [log_likelihood(reader, **row) for row in count_done(asked["rows"], done)],
        "answers": [reader.answer(**one) for one in count_done(asked["questions"], done)],
    }


def count_done(things: list[dict[str, Any]], path: str | None) -> Iterator[dict[str, Any]]:
    """Yield things, and add a byte to the file, if there is a path, once each is done."""
    for thing in things:
        yield thing
        if path is not None:
            with open(path, "ab") as file:
                file.write(b".")


def last_logits(reader: Any, tokens: list[int], columns: list[int]) -> list[float]:
    """Return the logits after the last token, of the token ids in `columns`.

    Without columns, some 256 evenly spread over the vocabulary.
    """
    (rows,) = reader.logits(tokens, [len(tokens) - 1])
    last = rows[0]
    chosen: list[float] = last[columns or range(0, last.size, max(1, last.size // 256))].tolist()
    return chosen


def log_likelihood(reader: Any, tokens: list[int], places: list[int]) -> float:
    """Return the summed log-probability of the tokens at these positions, given their prefix."""
    following = np.array(tokens)[np.array(places, np.int64)]
    pieces = reader.logits(tokens[:-1], [place - 1 for place in places])
    sums: list[np.typing.NDArray[np.float64]] = []
    start = 0
    for rows in split_rows(pieces):
        exact = rows.astype(np.float64)
        largest = exact.max(axis=-1)
        log_total = largest + np.log(np.exp(exact - largest[:, None]).sum(axis=-1))
        chosen = exact[np.arange(len(exact)), following[start : start + len(exact)]]
        sums.append(chosen - log_total)
        start += len(exact)
    return float(np.concatenate(sums).sum()) if sums else 0.0


def split_rows(pieces: Iterator[Logits]) -> Iterator[Logits]:
    """Yield the rows of all pieces in order, at most ROWS_AT_ONCE at a time."""
    for piece in pieces:
        for start in range(0, len(piece), ROWS_AT_ONCE):
            yield piece[start : start + ROWS_AT_ONCE]
