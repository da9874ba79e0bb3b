"""Which gradient a KL setting follows, by exact enumeration on small policies; needs torch and numpy only.

policies.py lists problems, gradients.py has the divergences, rules.py a setting, subjects.py and stock.py the functions
that are judged, enumeration.py their expected gradient, facts.py what it equals, verdict.py and reasons.py the
judgement, claims.py a recipe's, printing.py and figure.py the table.
"""

from klreg_verl.doctor.claims import check_claim, explain, judge_setting
from klreg_verl.doctor.rules import KLSetting, Rule
from klreg_verl.doctor.verdict import Judgement, judge, row, table

__all__ = ["Judgement", "KLSetting", "Rule", "check_claim", "explain", "judge", "judge_setting", "row", "table"]
