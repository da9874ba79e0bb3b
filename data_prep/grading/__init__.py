"""Whether an answer is right: read from a response, compared cheaply, and else by math-verify in processes of our own.

    extraction.py   the answer of a response: after the last </think>, in the last box, between <answer> tags
    echo.py         answers that repeat a formula of the question
    notation.py     one way of writing for what has many: characters, fonts, spacing, degrees
    units.py        what may stand after a number without changing it: a closed grammar
    structure.py    what an answer is: a value, a tuple, an interval, an assignment, a time of day, an option
    rationals.py    answers as exact rational numbers
    equality.py     whether two answers are the same; the table of what can be argued; decides most in microseconds
    values.py       simple expressions at one point, where most wrong ones differ
    bombs.py        expressions that are refused unread: power towers, giant factorials, deep nesting
    worker.py       the program that runs math-verify: limited in memory, unable to write, killed at its time limit
    pool.py         the processes of that program that this process owns
    mathematics.py  all of these together: is this answer one of the right ones?

No text that a model wrote is ever evaluated as code, here or in the worker.
"""
