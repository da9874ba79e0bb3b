"""What plugin.require_active asks for."""


class KLRegTrainer:
    pass


def get_trainer_cls(name: str) -> type:
    return KLRegTrainer
