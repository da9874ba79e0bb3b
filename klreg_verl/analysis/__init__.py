"""Reads run folders and turns them into tables, figures and a report. Needs neither torch nor verl nor a recipe.

runs      run folders -> Run values; an incomplete or broken one is named, never dropped
stats     means of windows of steps, their standard errors, differences, smoothing
summary   runs -> groups (one setting on one task), the final table, sentences and checks computed from the data
samples   stored responses of several settings to the same prompt, side by side
figures   groups -> Axes -> PNG, or SVG that takes its colours from the page
page      the self-contained HTML page
report    report.html, report.md, CSV tables, figures; the summary for the terminal
"""
