@echo off
rem Makes the environment with what the tests need, then runs every check. Arguments go to pytest: run_tests.bat tests\options -x
rem In a minute: run_tests.bat --quick
rem Another Python than the newest one for the environment: set PYTHON=C:\path\to\python.exe
setlocal
cd /d "%~dp0"
if not defined PYTHON where py >nul 2>nul && set "PYTHON=py"
if not defined PYTHON set "PYTHON=python"
"%PYTHON%" set_up.py --dev
if errorlevel 1 exit /b 1
set "failed="
.venv\Scripts\python.exe -m ruff check || set "failed=%failed% ruff"
.venv\Scripts\python.exe -m mypy || set "failed=%failed% mypy"
.venv\Scripts\python.exe -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder %* || set "failed=%failed% pytest"
if not defined failed exit /b 0
echo Failed:%failed% 1>&2
exit /b 1
