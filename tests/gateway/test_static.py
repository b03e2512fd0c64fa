"""The page and the script that the gateway serves."""

import re

import httpx
from gateway_fixtures import Served


async def test_the_page_is_one_file_that_may_reach_its_own_host_only(gateway: Served, http: httpx.AsyncClient) -> None:
    page = await http.get(f"{gateway.url}/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(src|href)=\"(?!data:,)|https?://|@import|innerHTML|insertAdjacentHTML", page.text)
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert page.headers["referrer-policy"] == "no-referrer"


async def test_the_page_is_an_example_of_less_than_200_lines_of_javascript(
    gateway: Served, http: httpx.AsyncClient
) -> None:
    page = (await http.get(f"{gateway.url}/")).text
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    code = [line for line in script.splitlines() if line.strip() and not line.strip().startswith("//")]
    assert len(code) < 200


async def test_the_script_is_at_most_100_lines_and_a_module_for_pages_of_any_origin(
    gateway: Served, http: httpx.AsyncClient
) -> None:
    script = await http.get(f"{gateway.url}/client.js", headers={"Origin": "https://app.example"})
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert script.headers["access-control-allow-origin"] == "*"
    assert len(script.text.splitlines()) <= 100
    assert "export const resumingFetch" in script.text
    assert "import " not in re.sub(r"//.*", "", script.text)


async def test_a_browser_that_has_the_file_gets_304(gateway: Served, http: httpx.AsyncClient) -> None:
    for path in ("/", "/client.js"):
        etag = (await http.get(f"{gateway.url}{path}")).headers["etag"]
        again = await http.get(f"{gateway.url}{path}", headers={"If-None-Match": f'W/"other", {etag}'})
        assert (again.status_code, again.content) == (304, b"")
        head = await http.head(f"{gateway.url}{path}")
        assert (head.status_code, head.content) == (200, b"")
