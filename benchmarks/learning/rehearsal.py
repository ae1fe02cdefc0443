"""Prompts of no task, with what the base answers: rows that an adapter may be trained on too.

They are of 40 kinds, twelve each, written for this study: no task's rows, and none of the general
instructions that judge. The base's greedy answers are kept in its folder, as rows that train; one
that the base does not end by itself is left out, for it would teach to end in the middle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm import batch_generate, load

REHEARSAL_NAME = "rehearsal.jsonl"
COUNT = 300
ANSWER_TOKENS = 192
AT_ONCE = 120  # prompts that are answered together
REHEARSAL_LENGTH = 320  # tokens of a row, prompt and answer

THINGS = (
    *("a bicycle", "the moon", "a lighthouse", "bread", "a thunderstorm", "a violin"),
    *("a glacier", "honey bees", "a compass", "the printing press", "coffee", "a coral reef"),
)
SUBJECTS = (
    *("gravity", "inflation", "photosynthesis", "democracy", "recycling", "vaccination"),
    *("evolution", "insurance", "electricity", "supply and demand", "the water cycle", "sleep"),
)
GOALS = (
    *("learn to swim", "save money", "sleep better", "grow tomatoes", "write a novel"),
    *("run ten kilometres", "make new friends", "learn a language", "tidy a garage"),
    *("prepare for an exam", "take better photos", "drink less coffee"),
)
PLACES = (
    *("a desert", "an old library", "a harbour", "a mountain village", "a space station"),
    *("a bakery", "a rainforest", "a museum at night", "a railway station", "a farm in winter"),
    *("a castle", "an empty beach"),
)
OCCASIONS = (
    *("a late delivery", "a birthday party", "a cancelled lesson", "a lost umbrella"),
    *("a job well done", "a broken window", "a change of address", "a summer picnic"),
    *("a missed call", "a new neighbour", "a school concert", "a noisy dog"),
)
PEOPLE = (
    *("a nurse", "an astronaut", "a carpenter", "a teacher", "a sailor", "a chef", "a detective"),
    *("a violinist", "a farmer", "a librarian", "a bus driver", "a painter"),
)
SENTENCES = (
    *("The train was late, so we walked home.", "She has planted three trees this year."),
    *("My brother fixes old radios.", "We could not find the key.", "The soup needs more salt."),
    *("They sold the boat in spring.", "The lecture begins at nine.", "I forgot my gloves."),
    *("Rain is expected on Sunday.", "The cat sleeps on the piano.", "He writes with a pencil."),
    *("Our garden is full of birds.",),
)
WORDS = (
    *("brave", "ancient", "quiet", "generous", "fragile", "rapid", "honest", "bitter", "narrow"),
    *("curious", "gloomy", "polite"),
)
PAIRS = (
    *("a lake and a river", "a novel and a poem", "weather and climate", "a crow and a raven"),
    *("jam and jelly", "a fruit and a vegetable", "speed and velocity", "a frog and a toad"),
    *("a city and a town", "wool and cotton", "a comet and an asteroid", "tea and coffee"),
)
NUMBERS = (
    *("17 and 26", "8 and 9", "45 and 15", "120 and 7", "33 and 66", "14 and 3", "250 and 50"),
    *("19 and 91", "6 and 72", "81 and 12", "5 and 500", "64 and 28"),
)
FUNCTIONS = (
    *("reverses a string", "adds up a list of numbers", "counts the vowels of a text"),
    *("finds the largest of three numbers", "says whether a number is even"),
    *("removes duplicates from a list", "sorts names by their length", "doubles every number"),
    *("computes a factorial", "joins words with commas", "turns Celsius into Fahrenheit"),
    *("checks whether a word is a palindrome",),
)
COUNTRIES = (
    *("Portugal", "Kenya", "Japan", "Peru", "Norway", "Egypt", "Vietnam", "Canada", "Greece"),
    *("Morocco", "Chile", "Finland"),
)
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Describe {} in two sentences.", THINGS),
    ("Write a riddle whose answer is {}.", THINGS),
    ("Name three facts about {}.", THINGS),
    ("Write a haiku about {}.", THINGS),
    ("What would a child ask about {}? Write one question.", THINGS),
    ("Explain {} in one sentence.", SUBJECTS),
    ("Explain {} to a ten-year-old in a short paragraph.", SUBJECTS),
    ("Name one common mistake that people make about {}.", SUBJECTS),
    ("Why does {} matter? Answer briefly.", SUBJECTS),
    ("Write a quiz question about {} and give its answer.", SUBJECTS),
    ("Give me three short tips to {}.", GOALS),
    ("What is the first step if I want to {}? One sentence.", GOALS),
    ("Encourage a friend who wants to {}, in two sentences.", GOALS),
    ("Write the opening sentence of a story set in {}.", PLACES),
    ("What might you hear in {}? List four sounds.", PLACES),
    ("Suggest a title for a song about {}.", PLACES),
    ("Describe the smell of {} in one sentence.", PLACES),
    ("Write a two-sentence email about {}.", OCCASIONS),
    ("Write a polite text message about {}.", OCCASIONS),
    ("Write a short subject line for a letter about {}.", OCCASIONS),
    ("Write one line of advice to somebody upset about {}.", OCCASIONS),
    ("What does {} do at work? Answer in one sentence.", PEOPLE),
    ("Write a short joke about {}.", PEOPLE),
    ("Name three tools that {} needs.", PEOPLE),
    ("Describe a morning in the life of {} in two sentences.", PEOPLE),
    ("Invent a name for {} in a children's book.", PEOPLE),
    ("Rewrite this sentence as a question: {}", SENTENCES),
    ("Translate into French: {}", SENTENCES),
    ("Say this in other words: {}", SENTENCES),
    ("Continue with one more sentence: {}", SENTENCES),
    ("What is the opposite of '{}'?", WORDS),
    ("Use the word '{}' in a sentence.", WORDS),
    ("Give two synonyms of '{}'.", WORDS),
    ("What is the difference between {}? Keep it short.", PAIRS),
    ("Name one thing that {} have in common.", PAIRS),
    ("What is the sum of {}?", NUMBERS),
    ("Which is larger of {}, and by how much?", NUMBERS),
    ("Write a Python function that {}.", FUNCTIONS),
    ("What is {} known for? Answer in one sentence.", COUNTRIES),
    ("Name a dish from {} and its main ingredient.", COUNTRIES),
)


def prompts() -> list[str]:
    """All prompts, the kinds mixed, always in the same order."""
    written = [template.format(filler) for template, fillers in KINDS for filler in fillers]
    return sorted(written, key=lambda text: hashlib.sha256(text.encode()).hexdigest())


def write_rehearsal(base: Path) -> None:
    """Write the first COUNT prompts whose answer the base ends, with it; SystemExit for fewer."""
    model, tokenizer, *_ = load(str(base))
    rows = list(answered(model, tokenizer, prompts()))[:COUNT]
    if len(rows) < COUNT:
        raise SystemExit(f"{base} ends {len(rows)} answers by itself, of {COUNT} that are needed.")
    lines = [json.dumps({"prompt": prompt, "completion": text}) for prompt, text in rows]
    (base / REHEARSAL_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def answered(model: Any, tokenizer: Any, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Each prompt with the greedy answer, where that ends within ANSWER_TOKENS."""
    for first in range(0, len(texts), AT_ONCE):
        some = texts[first : first + AT_ONCE]
        turns = [[{"role": "user", "content": text}] for text in some]
        encoded = [
            list(tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False))
            for t in turns
        ]
        done = batch_generate(
            model, tokenizer, encoded, max_tokens=ANSWER_TOKENS, return_token_ids=True
        )
        for text, tokens in zip(some, done.token_ids, strict=True):
            answer = tokenizer.decode(list(tokens), skip_special_tokens=True).strip()
            if answer and len(tokens) < ANSWER_TOKENS:
                yield text, answer
