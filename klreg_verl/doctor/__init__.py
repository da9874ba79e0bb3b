"""Which gradient a KL setting follows, by exact enumeration on small policies; needs torch and numpy only."""

from klreg_verl.doctor.verdict import Judgement, KLSetting, check_claim, explain, judge, table

__all__ = ["Judgement", "KLSetting", "check_claim", "explain", "judge", "table"]
