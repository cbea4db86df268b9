"""The program of `python -m tailtune …` with the installed package. In a checkout, tailtune.py is this program."""

from tailtune import command

if __name__ == "__main__":  # a process that multiprocessing spawns must not run the command again
    command()
