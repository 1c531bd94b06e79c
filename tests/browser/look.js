// node look.js URL SCREENSHOT light|dark: opens the status page, waits for two refreshes, hovers over the first expert
// and prints what a reader sees as JSON, and what is amiss at the widths of other screens.
"use strict";

const { chromium } = require("playwright-core");

const WIDTHS = [1440, 1024, 768, 390];

// In the page: words that leave it, labels that touch, words of the empty card of errors in several lines, the last tiles.
function amiss() {
  const words = (element) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    return range;
  };
  const labels = [...document.querySelectorAll("#heat .expert")].filter((label) => label.textContent)
    .map((label) => words(label).getBoundingClientRect());
  const empty = document.querySelector("#errors .empty");
  const tiles = [...document.querySelectorAll(".tile")].map((tile) => tile.getBoundingClientRect().top);
  return {
    wider: document.documentElement.scrollWidth > innerWidth,
    labels: labels.length,
    touching: labels.filter((label, index) => index && label.left < labels[index - 1].right + 4).length,
    squeezed: Boolean(empty) && words(empty).getClientRects().length > 1,
    tiles: tiles.filter((top) => top === tiles.at(-1)).length,
  };
}

async function look(url, screenshot, colorScheme) {
  const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ["--no-sandbox"] });
  const page = await browser.newPage({ colorScheme, viewport: { width: 1280, height: 900 } });
  const complaints = [];
  const requests = new Set();
  page.on("console", (message) => complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("request", (request) => requests.add(request.url()));
  await page.goto(url);
  const first = await (await page.waitForFunction(() => document.body.dataset.loaded)).jsonValue();
  await page.waitForFunction((before) => document.body.dataset.loaded !== before, first);
  await page.hover("#heat .cell");
  const seen = await page.evaluate(() => ({
    title: document.title,
    text: document.querySelector("main").innerText,
    state: document.getElementById("state").innerText,
    tip: document.getElementById("tip").innerText,
    cells: document.querySelectorAll("#heat .cell").length,
    colours: new Set([...document.querySelectorAll("#heat .cell")].map((cell) => getComputedStyle(cell).backgroundColor)).size,
    background: getComputedStyle(document.body).backgroundColor,
    wider: document.documentElement.scrollWidth > innerWidth,
  }));
  await page.screenshot({ path: screenshot, fullPage: true });
  const widths = {};
  for (const width of WIDTHS) {
    await page.setViewportSize({ width, height: 900 });
    await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
    widths[width] = await page.evaluate(amiss);
  }
  await page.route("**/status.json", (route) => route.abort());
  await page.waitForFunction(() => document.getElementById("state").innerText === "no answer");
  await browser.close();
  return { ...seen, widths, complaints: complaints.filter((text) => !text.includes("ERR_FAILED")), requests: [...requests] };
}

const [url, screenshot, colorScheme] = process.argv.slice(2);
look(url, screenshot, colorScheme).then(
  (seen) => console.log(JSON.stringify(seen)),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
