"""Reads run folders and turns them into tables, figures and a report. Needs neither torch nor verl nor a recipe.

runs      run folders -> Run values; an incomplete or broken one is named, never dropped
stats     means of windows of steps, their standard errors, differences, smoothing
summary   runs -> groups (one setting on one task), the final table, sentences and checks computed from the data
samples   stored responses of several settings to the same prompt, side by side
retention skills that were not trained, and the evaluations that `klreg eval` left
endpoints a run's value of a metric: the mean of its last evaluations or steps; values of single prompts
claims    the recipe's claims: differs, equivalent or undecided, from finished runs paired by seed
frontier  an arm's metric at a given KL: comparison at equal KL, frontiers with bands
diversity stored responses -> diversity of each run, arms comparable; embeddings: their embeddings, with model and hash
optimum   what each arm's objective is optimal at, from the starting model's draws, beside what was achieved
power     the seeds that a difference or an equivalence needs
figures   groups -> Axes -> PNG, or SVG that takes its colours from the page
page      the self-contained HTML page
report    report.html, report.md, CSV tables, figures; the summary for the terminal
"""
