def load_native():
    return None
