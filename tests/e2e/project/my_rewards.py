"""A user's reward function: verl's signature, a plain number."""


def count_vowels(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """The share of vowels among the answer's letters."""
    letters = [letter for letter in solution_str.lower() if letter.isalpha()]
    return sum(letter in "aeiou" for letter in letters) / max(len(letters), 1)
