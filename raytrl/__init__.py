"""raytrl: distributed post-training (SFT, reward models, DPO, PPO) on Ray."""

import os
import sys

__version__ = "0.1.0"
FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where Python finds this package


def _look_last_where_it_was_started() -> None:
    """Puts the folders that Python and Ray look in first behind the installed packages.

    They are the working directory and that of the script. A user's evaluate.py or datasets.py there would be imported instead
    of the library's, here and in every process of Ray. What PYTHONPATH names stays first: somebody asked for that.
    """
    asked = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    kept = {os.path.abspath(folder) for folder in [*asked, FOLDER]}
    library = os.path.dirname(os.__file__)
    before = sys.path[: sys.path.index(library)] if library in sys.path else []
    moved = [
        folder
        for folder in before
        if os.path.isdir(folder or ".") and os.path.abspath(folder) not in kept and "site-packages" not in folder
    ]
    sys.path[:] = [folder for folder in sys.path if folder not in moved] + moved


_look_last_where_it_was_started()
