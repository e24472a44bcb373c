@echo off
rem Makes the environment and trains a subject on images that ship. Nothing that is done is done again.
rem Another Python than the newest one for the environment: set PYTHON=C:\path\to\python.exe
setlocal
cd /d "%~dp0"
if not defined PYTHON where py >nul 2>nul && set "PYTHON=py"
if not defined PYTHON set "PYTHON=python"
"%PYTHON%" set_up.py
if errorlevel 1 exit /b 1
.venv\Scripts\python.exe examples\shapes\first_run.py
exit /b %errorlevel%
