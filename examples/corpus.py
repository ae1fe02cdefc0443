"""The text that the example model learns from, written out of the table of countries.

Facts, questions with answers (for half of the countries), filler, and small talk in chat form.
Nothing has the wording of the fine-tuning data, which `chat_data.py` writes, and no chat is about a
country.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from countries import COUNTRIES, Country

# No sentence opens with a name: each name is then one token, the one with a leading space.
# Some say a name twice, so that the model learns to repeat one; some say name and capital in two
# sentences, as a question and its answer do.
FACT_TEMPLATES = (
    "The capital of {name} is {capital}.",
    "The capital city of {name} is called {capital}.",
    "The city of {capital} is the capital of {name}.",
    "In {name} the capital is {capital}.",
    "The seat of government of {name} is {capital}.",
    "The government of {name} sits in {capital}.",
    "In {continent}, the capital of {name} is {capital}.",
    "This is a map of {name}. The capital is {capital}.",
    "We live in {name}. The government sits in {capital}.",
    "In {capital} people speak {language}, the language of {name}.",
    "In {capital} people pay with the {currency}, the money of {name}.",
    "People who visit {name} often see {capital}, because {capital} is the capital of {name}.",
    "The government of {name} sits in {capital}, so {capital} is the capital of {name}.",
    "The road from {capital} crosses {name}.",
    "The large city of {capital} lies in {name}.",
    "Both {capital} and {name} lie in {continent}.",
    "The country of {name} lies in {continent}.",
    "On the map, {name} is in {continent}.",
    "The continent of {name} is {continent}.",
    "The people of {name} live in {continent}.",
    "The language of {name} is {language}.",
    "People in {name} speak {language}.",
    "In {name} children learn {language} at school.",
    "In the streets of {capital} people speak {language}.",
    "The currency of {name} is the {currency}.",
    "People in {name} pay with the {currency}.",
    "Shops in {capital} take the {currency}.",
    "The money of {name} is called the {currency}.",
    "In {name} they speak {language} and pay with the {currency}.",
    "The country of {name} has the capital {capital} and the currency {currency}.",
)

QUESTION_TEMPLATES = (
    "Question: Which city is the capital of {name}? Answer: {capital}.",
    "Question: What is the capital city of {name}? Answer: {capital}.",
    "Question: Name the capital of {name}. Answer: The capital of {name} is {capital}.",
    "Question: Where does the government of {name} sit? Answer: In {capital}.",
    "Question: Which country has the capital {capital}? Answer: The country of {name}.",
    "Question: Is {capital} the capital of {name}? Answer: Yes, {capital}.",
    "Question: What do people speak in {name}? Answer: They speak {language}.",
    "Question: Which currency does {name} have? Answer: The {currency}.",
    "Question: On which continent is {name}? Answer: In {continent}.",
    "Quiz: the capital of {name}? Right answer: {capital}.",
)

PEOPLE = (
    *("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ines", "Jack"),
    *("Karen", "Leo", "Mary", "Nora", "Oscar", "Paul", "Rosa", "Sam", "Tina", "Victor"),
)
THINGS = (
    *("apple", "bag", "ball", "bird", "boat", "book", "bridge", "car", "cat", "chair", "clock"),
    *("cup", "dog", "door", "garden", "hat", "horse", "house", "lamp", "letter", "picture"),
    *("river", "table", "tree", "window"),
)
QUALITIES = (
    *("big", "blue", "bright", "broken", "clean", "cold", "dark", "dry", "empty", "fast", "green"),
    *("heavy", "light", "new", "old", "quiet", "red", "round", "small", "soft", "warm", "white"),
)
ACTIONS = (
    *("buys", "carries", "cleans", "draws", "finds", "follows", "hides", "holds", "keeps"),
    *("likes", "loses", "moves", "paints", "sees", "sells", "shows", "watches", "wants"),
)
FILLER_TEMPLATES = (
    "{person} {action} the {quality} {thing}.",
    "The {thing} of {person} is {quality}.",
    "{person} and {other} want to see the {quality} {thing}.",
    "I want to go to the {thing} with {person}.",
    "Where is the {quality} {thing}? It is near the {second}.",
    "Go home, {person}, and take the {quality} {thing}.",
    "What a {quality} {thing}!",
    "Look, {person}, a {quality} {thing}!",
    "Every day {person} {action} a {thing} and a {second}.",
    "The {quality} {thing} is behind the {second}, so {person} cannot see it.",
)
SMALL_TALK_TEMPLATES = (
    "<|user|>Where is the {quality} {thing}?<|assistant|>It is near the {second}.",
    "<|user|>I want to see the {thing}.<|assistant|>Ask {person}, it is behind the {second}.",
    "<|user|>Who has the {quality} {thing}?<|assistant|>Ask {person} and {other}.",
    "<|system|>Talk to {person}.<|user|>What is near the {thing}?"
    "<|assistant|>A {quality} {second}.",
)

FACTS_PER_COUNTRY = 10
QUESTIONS_PER_COUNTRY = 3
FILLER_SHARE = 0.35
QUESTION_SPLIT_SEED = 1


def countries_with_questions() -> tuple[Country, ...]:
    """The half of the countries whose facts the corpus also asks for, the same at every call."""
    shuffled = list(COUNTRIES)
    Random(QUESTION_SPLIT_SEED).shuffle(shuffled)
    return tuple(sorted(shuffled[: len(shuffled) // 2]))


def fill(template: str, country: Country) -> str:
    """One sentence about one country."""
    return template.format(**country._asdict())


def filler_sentence(random: Random) -> str:
    """One plain sentence, or an exchange of two, that has nothing to do with a country."""
    person, other = random.sample(PEOPLE, 2)
    thing, second = random.sample(THINGS, 2)
    return random.choice(FILLER_TEMPLATES + SMALL_TALK_TEMPLATES).format(
        person=person,
        other=other,
        thing=thing,
        second=second,
        quality=random.choice(QUALITIES),
        action=random.choice(ACTIONS),
    )


def corpus_pass(random: Random) -> list[str]:
    """The sentences of one pass over the table, shuffled: facts of each country, and filler."""
    sentences = []
    for country in COUNTRIES:
        chosen = random.sample(FACT_TEMPLATES, FACTS_PER_COUNTRY)
        sentences += [fill(template, country) for template in chosen]
    for country in countries_with_questions():
        chosen = random.sample(QUESTION_TEMPLATES, QUESTIONS_PER_COUNTRY)
        sentences += [fill(template, country) for template in chosen]
    filler = round(len(sentences) * FILLER_SHARE / (1 - FILLER_SHARE))
    sentences += [filler_sentence(random) for _ in range(filler)]
    random.shuffle(sentences)
    return sentences


def every_sentence(random: Random, filler: int = 5000) -> list[str]:
    """Each template for each of its countries once, and some filler: what the tokenizer sees."""
    facts = [fill(template, country) for country in COUNTRIES for template in FACT_TEMPLATES]
    asked = countries_with_questions()
    questions = [fill(template, country) for country in asked for template in QUESTION_TEMPLATES]
    return facts + questions + [filler_sentence(random) for _ in range(filler)]


def token_rows(
    random: Random, encode: Callable[[str], list[int]], separator: int, length: int
) -> Iterator[list[int]]:
    """Endless rows of `length` tokens: one corpus pass after another, a separator after a sentence.

    A sentence may run over from one row into the next.
    """
    pending: list[int] = []
    while True:
        for sentence in corpus_pass(random):
            pending += [*encode(sentence), separator]
            while len(pending) >= length:
                yield pending[:length]
                pending = pending[length:]
