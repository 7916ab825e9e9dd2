"""The sentences the demo's base and voice are made of: a closed domain of a few hundred words, and its grammar.

A model of a few million parameters learns to read from a few hours of speech only if it hears every word often. So the
sentences come from templates with slots, and everything that can be said is also a JSGF grammar, under which a speech
recognizer can tell whether a spoken sentence came out as it was written.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tortoise_hf.text import clean_text

NUM_DEMO_SENTENCES = 300
"""What the demo voice reads: nearly a quarter of an hour."""
NUM_DEMO_ALONE = 120
"""Of these, nobody else reads them; the others are also among those that the base's speakers read."""
NUM_UNSEEN_SENTENCES = 100
"""Texts that neither the base nor the demo voice has read, to ask a trained voice for."""

_WORD = re.compile(r"[a-z']+")
_SLOT = re.compile(r"\{(\w+)\}")

# Left out are words that sound like others: thirteen to nineteen beside thirty to ninety, fifty minutes beside fifteen.
# Minutes below ten too: "7:05" would be read "seven five".
_NUMBERS = [*range(2, 13), *range(20, 100)]
_MINUTES = (10, 15, 20, 25, 30, 35, 40, 45, 55)
_DAYS = (*range(1, 13), *range(20, 30))
_CENTS = (20, 25, 40, 50, 75, 95)
_SUFFIXES = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}

# What may stand in a slot, as it is printed. Words with an initial vowel appear only where no "a" precedes them.
SLOTS: dict[str, list[str]] = {
    "name": ["Anna", "Peter", "Maria", "David", "Sarah", "Thomas", "Julia", "Martin", "Oliver", "Nicole"],
    "title": ["Dr. Brown", "Dr. Wilson", "Dr. Parker", "Mr. Miller", "Mr. Cooper", "Mr. Wilson"],
    "relative": ["mother", "father", "sister", "brother", "uncle", "cousin"],
    "job": ["doctor", "teacher", "farmer", "painter", "captain", "lawyer", "baker", "driver"],
    "animal": ["horse", "rabbit", "monkey", "tiger", "elephant", "chicken", "dog", "cat"],
    "city": ["London", "Paris", "Boston", "Berlin", "Chicago", "Madrid", "Denver", "Vienna"],
    "place": ["station", "hospital", "museum", "market", "bridge", "church", "theater", "school"],
    "room": ["kitchen", "garden", "office", "bedroom", "garage", "library", "basement"],
    "street": ["Market", "Church", "Garden", "Bridge", "Station"],
    "event": ["concert", "meeting", "wedding", "movie", "party", "lesson"],
    "object": ["table", "window", "ladder", "basket", "bicycle", "umbrella", "blanket", "camera", "hammer", "mirror"],
    "color": ["red", "green", "yellow", "purple", "silver", "blue", "black", "white"],
    "food": ["bread", "coffee", "cheese", "sugar", "butter", "soup", "pepper", "chocolate", "honey", "rice"],
    "fruit": ["apples", "tomatoes", "potatoes", "lemons", "cookies", "bananas"],
    "weather": ["sunny", "cloudy", "windy", "foggy", "cold", "warm", "rainy"],
    "storm": ["rain", "snow", "thunder"],
    "quality": ["clean", "quiet", "dark", "small", "bright", "empty"],
    "daypart": ["morning", "afternoon", "evening"],
    "weekday": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "month": [
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ],
    "number": [str(number) for number in _NUMBERS],
    "few": [str(number) for number in range(2, 13)],
    "ordinal": [f"{day}{_SUFFIXES.get(day, 'th')}" for day in _DAYS],
    "year": [str(year) for year in (*range(1950, 2000), *range(2020, 2030))],
    "hour": [str(hour) for hour in range(1, 13)],
    "time": [f"{hour}:{minute}" for hour in range(1, 13) for minute in _MINUTES],
    "price": [
        *(f"${dollars}" for dollars in _NUMBERS),
        *(f"${dollars}.{cents}" for dollars in _NUMBERS[:20] for cents in _CENTS),
    ],
}

TEMPLATES = [
    "Train {number} to {city} leaves at {time}.",
    "The train to {city} leaves from platform {few} at {time}.",
    "The {time} train from {city} is {number} minutes late.",
    "The last bus to {city} leaves at {hour} o'clock.",
    "A ticket from {city} to {city} costs {price}.",
    "I would like {few} tickets to {city}, please.",
    "Bus {number} stops near the {place} every {daypart}.",
    "Our flight from {city} arrives on {weekday} {daypart}.",
    "{name} took the train from {city} to {city}.",
    "We will arrive in {city} at about {time}.",
    "The {event} is on {month} {ordinal}.",
    "{name} was born on {month} {ordinal}, {year}.",
    "The {place} is closed on {weekday}, {month} {ordinal}.",
    "My {relative} has a birthday on the {ordinal} of {month}.",
    "The {place} in {city} opened in {month} {year}.",
    "{name} moved to {city} in the summer of {year}.",
    "Today is {weekday}, {month} {ordinal}.",
    "Please call {title} before {month} {ordinal}.",
    "The {event} starts at {time} on {weekday}.",
    "It is {hour} o'clock in the {daypart}.",
    "{name} will call you at {time} tomorrow {daypart}.",
    "Please wake me up at {time} on {weekday}.",
    "The {place} closes at {hour} o'clock on {weekday}.",
    "We have breakfast in the {room} at {time}.",
    "The {color} {object} costs {price}.",
    "{name} paid {price} for the {object}.",
    "I bought {number} {fruit} for {price}.",
    "A pound of {food} costs {price}.",
    "You can rent a {color} bicycle for {price}.",
    "There are {number} {fruit} in the {room}.",
    "{name} lives at {number} {street} Street.",
    "Please open your book on page {number}, {name}.",
    "Room {number} is next to the {room}.",
    "We picked {number} {fruit} on the farm.",
    "My {relative} is {number} years old today.",
    "The answer to question {few} is {number}.",
    "It will be {weather} in {city} on {weekday}.",
    "Tomorrow {daypart} will be {weather} and {weather}.",
    "It was {number} degrees in {city} this {daypart}.",
    "The weather in {month} is often {weather}.",
    "Expect {storm} in {city} on {weekday} {daypart}.",
    "{name} left the {color} {object} in the {room}.",
    "Please put the {object} back in the {room}.",
    "Where is the {color} {object}?",
    "Could you bring me some {food} and {food}?",
    "{name} and {name} are waiting in the {room}.",
    "The {job} is sitting next to the {object}.",
    "We met {title} in the café on {weekday}.",
    "My {relative} never eats {food} with {food}.",
    "The {animal} is sleeping under the {object}.",
    "{name} wants to be a {job} in {city}.",
    "I can see a {color} {animal} behind the {object}.",
    "Did {name} forget the {object} again?",
    "There is no more {food} in the {room}.",
    "My {relative} works as a {job} in {city}.",
    "{name} gave the {animal} some {food}.",
    "Turn left at the {place} and walk {number} meters.",
    "The {room} is {quality}, but the {room} is {quality}.",
    "Have you ever been to {city} in {month}?",
    "I will meet {name} near the {place} at {time}.",
    "The {job} asked {name} to wait outside.",
    "{title} will be back on {weekday} {daypart}.",
    "The {color} house near the {place} belongs to {title}.",
    "Was the {object} under the {object} or in the {room}?",
]

_WRITTEN_OUT = {"Dr.": "Doctor", "Mr.": "Mister", "café": "cafe"}
"""What is printed in one way and spoken as in another, besides numbers."""


@dataclass(frozen=True)
class Sentence:
    """One text as printed, and as spoken: numbers and abbreviations written out."""

    printed: str
    spoken: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words a listener hears, lower-case, without hyphens and punctuation."""
        return spoken_words(self.spoken)


@dataclass(frozen=True)
class Sentences:
    """Three sets; `unseen` shares no sentence with the others."""

    demo: list[Sentence]
    """For the demo voice."""
    unseen: list[Sentence]
    """To be spoken by a trained voice, never to be trained on."""
    corpus: Iterator[Sentence] = field(repr=False)
    """For the base: distinct sentences, as many as are asked for (the domain has over a hundred thousand)."""


def spoken_words(text: str) -> tuple[str, ...]:
    """Lower-case words of a text that is written out; hyphens divide words."""
    return tuple(_WORD.findall(text.lower()))


def write_out(text: str) -> str:
    """Printed form -> spoken form, numbers as our own text cleaning reads them; letter case stays elsewhere."""
    for printed, spoken in _WRITTEN_OUT.items():
        text = text.replace(printed, spoken)
    text = re.sub(r"\$?\d[\d.:]*(?<=\d)(?:st|nd|rd|th)?", lambda match: clean_text(match[0]).replace(":", " "), text)
    return text[0].upper() + text[1:]


def draw_sentences(seed: int = 0) -> Sentences:
    """Draw the three sets. Every template is used equally often; the same seed gives the same sentences."""
    rng = random.Random(seed)
    sentences = _distinct_sentences(rng)
    alone = [next(sentences) for _ in range(NUM_DEMO_ALONE)]
    unseen = [next(sentences) for _ in range(NUM_UNSEEN_SENTENCES)]
    shared = [next(sentences) for _ in range(NUM_DEMO_SENTENCES - NUM_DEMO_ALONE)]
    return Sentences(alone + shared, unseen, itertools.chain(shared, sentences))


def _distinct_sentences(rng: random.Random) -> Iterator[Sentence]:
    seen: set[tuple[str, ...]] = set()
    while True:
        for template in rng.sample(TEMPLATES, len(TEMPLATES)):
            sentence = _fill(template, rng)
            # A template with few fillings is left out of some rounds once most of them are used.
            if sentence.words not in seen:
                seen.add(sentence.words)
                yield sentence


def _fill(template: str, rng: random.Random) -> Sentence:
    """Fill the slots of a template; the same value never stands in it twice."""
    slots = _SLOT.findall(template)
    values = {slot: rng.sample(SLOTS[slot], slots.count(slot)) for slot in dict.fromkeys(slots)}
    printed = _SLOT.sub(lambda match: values[match[1]].pop(), template)
    return Sentence(printed, write_out(printed))


def grammar() -> str:
    """The whole domain as a JSGF grammar of lower-case spoken words: a rule per slot, a rule of all templates."""
    lines = ["#JSGF V1.0;", "grammar base;", ""]
    for slot, values in SLOTS.items():
        alternatives = dict.fromkeys(" ".join(spoken_words(write_out(value))) for value in values)
        lines.append(f"<{slot}> = {' | '.join(alternatives)};")
    lines += ["", "public <sentence> ="]
    lines += [f"    {'|' if index else ' '} {_template_rule(template)}" for index, template in enumerate(TEMPLATES)]
    return "\n".join(lines) + "\n    ;\n"


def _template_rule(template: str) -> str:
    parts = re.split(r"(\{\w+\})", template)
    rule = [
        f"<{part[1:-1]}>" if _SLOT.fullmatch(part) else " ".join(spoken_words(write_out(part)))
        for part in parts
        if part
    ]
    return " ".join(part for part in rule if part)
