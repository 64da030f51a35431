__version__ = "0.1.0"


def __getattr__(name):
    "`halos_nb.report(run)` without making `import halos_nb` heavy."
    if name != "report": raise AttributeError(f"module 'halos_nb' has no attribute {name!r}")
    from halos_nb.page import report
    return report
