from litgpt_akl.cli.main import main

if __name__ == "__main__":
    main()
