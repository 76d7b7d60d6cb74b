"""A real browser for the tests of HTML pages."""

import json
import re
import shutil
import subprocess
import urllib.request

import pytest


class Browser:
    """The few WebDriver calls that are needed here, over HTTP to chromedriver."""

    def __init__(self, chromium, driver, profile):
        self.process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        for line in self.process.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                self.address = f"http://127.0.0.1:{found[1]}"
                break
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        options = {"binary": chromium, "args": [*flags, "--disable-dev-shm-usage", f"--user-data-dir={profile}"]}
        always = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = ""
        opened = self("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self.session = f"/session/{opened['sessionId']}"

    def __call__(self, method, path, body=None):
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + self.session + path, data, headers, method=method)
        # No proxy: this is a process on the same machine.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, path, width=1280, dark=False):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self("POST", "/url", {"url": path.as_uri()})

    def cdp(self, command, **parameters):
        return self("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def js(self, script, *arguments):
        return self("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def all(self, selector, expression):
        """A JavaScript expression of each node ``n`` that the selector finds."""
        return self.js(f"return [...document.querySelectorAll(arguments[0])].map(n => {expression})", selector)

    def click(self, selector, index=0):
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, index)

    def choose(self, selector, value):
        """Set a control, by value or by the text of an option."""
        self.js(
            "const n = document.querySelector(arguments[0]), all = [...(n.options || [])];"
            "n.value = (all.find(o => o.text === arguments[1]) || {value: arguments[1]}).value;"
            " for (const e of ['input', 'change']) n.dispatchEvent(new Event(e))",
            selector, value,
        )  # fmt: skip

    def complaints(self):
        """Errors and warnings of the console, and every request for anything but the page itself."""
        console, events = (self("POST", "/se/log", {"type": kind}) for kind in ("browser", "performance"))
        messages = [entry["message"] for entry in console if entry["level"] in ("SEVERE", "WARNING")]
        events = [json.loads(entry["message"])["message"] for entry in events]
        sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return messages + [
            url for url in sent if not url.startswith(("file:", "data:", "chrome:", "chrome-untrusted:"))
        ]

    def close(self):
        try:
            self("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(10)


def open_browser(profile):
    """Headless Chromium with this profile; skips the test where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and chromedriver (Debian: chromium, chromium-driver)")
    return Browser(chromium, driver, profile)
