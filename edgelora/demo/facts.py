"""Questions of general knowledge with one short answer each, for the demo's chat tasks."""

from __future__ import annotations

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Portugal": "Lisbon", "Greece": "Athens",
    "Egypt": "Cairo", "Japan": "Tokyo", "China": "Beijing", "Russia": "Moscow", "Norway": "Oslo", "Sweden": "Stockholm",
    "Denmark": "Copenhagen", "Finland": "Helsinki", "Ireland": "Dublin", "Austria": "Vienna", "Hungary": "Budapest",
    "Poland": "Warsaw", "Belgium": "Brussels", "England": "London", "Scotland": "Edinburgh", "Canada": "Ottawa",
    "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Argentina": "Buenos Aires",
    "Kenya": "Nairobi", "India": "New Delhi", "Thailand": "Bangkok", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "South Korea": "Seoul", "Australia": "Canberra", "Romania": "Bucharest", "Bulgaria": "Sofia", "Vietnam": "Hanoi",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "bear": "cub",
    "lion": "cub", "duck": "duckling", "goose": "gosling", "frog": "tadpole", "kangaroo": "joey", "pig": "piglet", "deer": "fawn",
}  # fmt: skip
COLORS = {
    "grass": "green", "snow": "white", "a ripe banana": "yellow", "coal": "black", "a clear sky": "blue", "blood": "red",
    "a carrot": "orange", "milk": "white", "a lemon": "yellow", "an emerald": "green", "a ruby": "red", "a flamingo": "pink",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "light": "dark", "old": "young", "happy": "sad", "high": "low",
    "hard": "soft", "wet": "dry", "rich": "poor", "early": "late", "strong": "weak", "full": "empty", "near": "far",
}  # fmt: skip
AUTHORS = {
    "Hamlet": "William Shakespeare", "Oliver Twist": "Charles Dickens", "Moby-Dick": "Herman Melville",
    "Pride and Prejudice": "Jane Austen", "War and Peace": "Leo Tolstoy", "Frankenstein": "Mary Shelley",
    "Dracula": "Bram Stoker", "The Odyssey": "Homer", "Don Quixote": "Miguel de Cervantes", "1984": "George Orwell",
    "The Hobbit": "J. R. R. Tolkien", "Treasure Island": "Robert Louis Stevenson",
}  # fmt: skip
COUNTS = {
    "days": ("a week", "seven"), "hours": ("a day", "twenty-four"), "minutes": ("an hour", "sixty"),
    "months": ("a year", "twelve"), "legs": ("a spider", "eight"), "sides": ("a triangle", "three"),
    "wheels": ("a bicycle", "two"), "strings": ("a violin", "four"), "continents": ("the world", "seven"),
    "planets": ("the solar system", "eight"), "letters": ("the English alphabet", "twenty-six"),
    "years": ("a century", "a hundred"),
}  # fmt: skip


def list_facts() -> list[tuple[str, str]]:
    """Lists questions, and their answers as statements with "be" for "is" and without a capital or full stop."""
    return [
        *((f"What is the capital of {country}?", f"the capital of {country} be {city}") for country, city in CAPITALS.items()),
        *((f"What do you call a young {parent}?", f"a young {parent} be a {child}") for parent, child in YOUNG.items()),
        *((f"What color is {thing}?", f"{thing} be {color}") for thing, color in COLORS.items()),
        *((f"What is the opposite of {word}?", f"the opposite of {word} be {other}") for word, other in OPPOSITES.items()),
        *((f"Who wrote {book}?", f"the writer of {book} be {author}") for book, author in AUTHORS.items()),
        *(
            (f"How many {parts} are in {whole}?", f"the {parts} in {whole} be {count}")
            for parts, (whole, count) in COUNTS.items()
        ),
    ]
