"""How a prompt asks for its answer: plain text, or a form that the reward then looks for.

Reasoning models distilled from DeepSeek-R1 want no system prompt and the instruction in the user's turn (their model
card says so), so an instruction is appended to the question and no system message is ever written.

A row whose prompt asks for a form says so under `answer_format` in its meta; the reward reads exactly that form.
"""

INSTRUCTIONS = {
    "boxed": r"Please reason step by step, and put your final answer within \boxed{}.",
    "answer": "Please reason step by step, and put your final answer between <answer> and </answer>.",
}
R1_FORMATS = {"r1_boxed": "boxed", "r1_answer": "answer"}
"""The styles for reasoning models, and the form that each asks for."""


def form_of(style: str) -> dict[str, str]:
    """What a row's meta says about the form of the answer: nothing for plain text."""
    return {"answer_format": R1_FORMATS[style]} if style in R1_FORMATS else {}


def prompt_text(compact: str, question: str, style: str) -> str:
    """The user's message: the question with its instruction for a style of R1_FORMATS, reasoning-gym's question for
    "question", and the compact item for any other style."""
    if style in R1_FORMATS:
        return f"{question.rstrip()} {INSTRUCTIONS[R1_FORMATS[style]]}"
    return question if style == "question" else compact
