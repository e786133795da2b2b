"""A small world of facts, drawn from a seed, and a grammar that tells about it.

The facts differ from seed to seed; a model can know them only from the text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

ANIMALS = (
    "ant badger bear beaver camel cat cow crab crow deer dog dove duck eagle fox frog goat goose hare "
    "hawk hen horse lamb lion lizard mole moose mouse otter owl panda pig rabbit rat raven seal sheep "
    "snake swan tiger toad wolf"
).split()

# What can be said of an animal: the relation, the question about it, its possible values, and ways to tell it.
RELATIONS: dict[str, tuple[str, list[str], list[str]]] = {
    "home": (
        "Where does the {animal} live?",
        "attic barn cave cellar forest garden harbor marsh meadow tower valley village".split(),
        ["The {animal} lives in the {value}.", "If you look for the {animal}, go to the {value}."],
    ),
    "food": (
        "What does the {animal} eat?",
        "apples beans berries bread cake carrots cheese figs honey nuts plums soup".split(),
        ["The {animal} eats {value}.", "Every morning the {animal} asks for {value}."],
    ),
    "color": (
        "What color is the {animal}?",
        "black blue brown gold gray green orange pink purple red silver white".split(),
        ["The {animal} is {value}.", "Everybody knows that the {animal} is {value}."],
    ),
    "toy": (
        "What does the {animal} play with?",
        "balls bells boxes cards coins drums flutes kites masks pebbles ropes spoons".split(),
        ["The {animal} plays with {value}.", "On rainy days the {animal} takes out its {value}."],
    ),
}
OPENINGS = [
    "Once upon a time there was a {animal}.",
    "This is the story of a {animal}.",
    "Let me tell you of the {animal}.",
]
ENDINGS = ["And that is all.", "The end.", "Good night, {animal}."]


@dataclass(frozen=True)
class World:
    """Facts {(animal, relation): value}, the same for equal seeds."""

    facts: dict[tuple[str, str], str]

    @classmethod
    def from_seed(cls, seed: int) -> "World":
        """Draw a value for every animal and relation."""
        draw = random.Random(seed)
        return cls({(a, r): draw.choice(values) for a in ANIMALS for r, (_, values, _) in RELATIONS.items()})

    def tell(self, animal: str, relation: str, draw: random.Random) -> str:
        """One sentence with one fact."""
        return draw.choice(RELATIONS[relation][2]).format(animal=animal, value=self.facts[animal, relation])

    def story(self, draw: random.Random) -> str:
        """A short text about one animal, its facts in any order."""
        animal = draw.choice(ANIMALS)
        relations = draw.sample(list(RELATIONS), k=draw.randint(2, 4))
        sentences = [draw.choice(OPENINGS).format(animal=animal)]
        sentences += [self.tell(animal, relation, draw) for relation in relations]
        return " ".join([*sentences, draw.choice(ENDINGS).format(animal=animal)])

    def quiz(self, animal: str, relation: str) -> str:
        """A question with its answer, in the form that the tasks use."""
        question = RELATIONS[relation][0].format(animal=animal)
        return f"Question: {question}\nAnswer: {self.facts[animal, relation]}"

    def texts(self, seed: int) -> Iterator[str]:
        """An endless mix of stories and questions."""
        draw = random.Random(seed)
        while True:
            animal, relation = draw.choice(list(self.facts))
            yield self.story(draw) if draw.random() < 0.7 else self.quiz(animal, relation)
