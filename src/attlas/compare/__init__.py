"""The main job: a grid of model × method × task, its results file and its report."""
