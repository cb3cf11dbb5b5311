"""`python -m fastgan` prints what this installation is made of."""

from fastgan import build_info

if __name__ == "__main__":
    for key, value in build_info().items():
        print(f"{key:20} {', '.join(value) or 'none' if isinstance(value, (list, tuple)) else value}")
