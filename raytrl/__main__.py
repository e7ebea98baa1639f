from raytrl.cli import main

main()
