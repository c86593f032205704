METHODS = {  # of each family: name, what the tables call it, script, its flags, the method before it
    "vte": {
        "avt": ("AVT", "avt.py", [], None),
        "pt": ("predictive transformation", "predictive_transform.py", [], None),
        "vte_ba": ("VTE-BA", "vte_ba.py", [], "pt"),
        "vte_infonce1": ("VTE-InfoNCE (1) separated", "vte_infonce.py", ["--critic", "separated"], "pt"),
        "vte_infonce2": ("VTE-InfoNCE (2) concatenated", "vte_infonce.py", ["--critic", "concatenated"], "pt"),
        "steerable": ("VTE-BA, decoder sees t (ours)", "vte_ba.py", ["--steerable"], "pt"),
    },
    "stl": {
        "stl": ("STL", "stl.py", [], None),
        "simclr": ("SimCLR", "stl.py", ["--equi", "0", "--trans", "0", "--batch", "independent"], None),
        "augmix": ("STL + AugMix", "stl.py", ["--augmix"], None),
    },
}


def write_pages(results, root):
    """Stub."""
