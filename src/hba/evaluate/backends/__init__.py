"""Who answers rows: `interface` says what a backend is and which there are, each other file is one of them."""
