"""Studies: arms x seeds on one text, paired by seed, with error bars and the controls that decide."""
