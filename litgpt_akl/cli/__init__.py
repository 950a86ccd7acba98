"""The commands of this package in LitGPT's command line. Importing this imports nothing: other programs do, too."""
