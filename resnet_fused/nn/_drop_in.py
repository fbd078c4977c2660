"""The mixin of the modules that fuse themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..fusion import Settings
from ..matchers.blocks import match_block
from ..matchers.layers import Model, Refused
from ..matchers.probe import Prober
from ..mixins import Fused
from ..settings import ACCURACIES, BACKENDS, one_of


class DropIn(Fused):
    """A module that `eval()` fuses, if its children can be fused: else it stays what the class behind it is."""

    _settings = Settings()

    def _configure(self, backend: str, accuracy: str) -> None:
        self._settings = Settings(one_of("backend", backend, BACKENDS), one_of("accuracy", accuracy, ACCURACIES))

    def train(self, mode: bool = True) -> Any:
        """As in torch.nn.Module; `eval()` fuses, and folds the BatchNorms again."""
        super().train(mode)
        if not mode and (self._fused_op is None or self._fused_op.changed()):
            self.fuse()
        return self

    def fuse(self) -> None:
        """Fuse this module if it can be: when its children are not the ones that it was made with, it may not."""
        assert isinstance(self, nn.Module)
        settings = self._settings if self._fused_op is None else self._fused_op.settings
        model = Model(self)
        self._fused_op, self._unfused_reasons = None, {}
        try:
            candidates = match_block(self, model, settings, True) or match_block(self, model, settings, False)
            if candidates:
                self._fused_op = Prober().choose(candidates, type(self).__name__)
        except Refused as error:
            convs = (name for name, module in self.named_modules() if isinstance(module, nn.Conv2d))
            self._unfused_reasons = dict.fromkeys(convs, str(error))
