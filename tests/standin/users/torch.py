"""Programs that tests start run as they do for users, who have no torch."""

raise ImportError('torch is hidden from the programs that tests start')
