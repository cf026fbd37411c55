"""Questions to a page, asked inside it: is its text readable, does it fit, can a finger and a keyboard reach it?

Each is a script for `driver.execute_script`; all give lists of offenders, empty when all is well.
"""

# WCAG 2.1, 1.4.3: (lighter + .05) / (darker + .05) of relative luminances. Backgrounds are blended from the root down;
# text in an SVG is seen against the painted shapes beneath its middle.
CONTRAST = """
const least = arguments[0];
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const known = new Map();
function rgba(color) {
  if (!known.has(color)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    known.set(color, [r, g, b, a / 255]);
  }
  return known.get(color);
}
function over([r, g, b, a], under) {
  return [r, g, b].map((part, i) => part * a + under[i] * (1 - a));
}
function luminance(color) {
  const [r, g, b] = color.map(part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function fill(style, kind, opacity) {
  const [r, g, b, a] = rgba(style[kind]);
  return [r, g, b, a * Number(style[opacity] ?? 1)];
}
const painted = new Map();
function paper() {
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  return scheme.startsWith('dark') || (scheme.includes('dark') && matchMedia('(prefers-color-scheme: dark)').matches)
    ? [18, 18, 18] : [255, 255, 255];
}
function background(element) {
  if (!element) return paper();
  if (!painted.has(element)) {
    const under = background(element.parentElement);
    const style = getComputedStyle(element);
    painted.set(element, element instanceof SVGElement && element.tagName !== 'svg'
      ? under : over(rgba(style.backgroundColor), under));
  }
  return painted.get(element);
}
function beneath(element, box) {
  const svg = element.closest('svg');
  let under = background(svg);
  const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  for (const shape of svg.querySelectorAll('rect, circle, path, polygon')) {
    if (shape.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_PRECEDING) break;
    const place = shape.getScreenCTM();
    const style = getComputedStyle(shape);
    if (!place || style.fill === 'none' || style.visibility === 'hidden') continue;
    const point = new DOMPoint(x, y).matrixTransform(place.inverse());
    if (shape.isPointInFill(point)) under = over(fill(style, 'fill', 'fillOpacity'), under);
  }
  return under;
}
function opacity(element) {
  let product = 1;
  for (let at = element; at; at = at.parentElement) product *= Number(getComputedStyle(at).opacity);
  return product;
}
const found = [];
let seen = 0;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const text = node.textContent.trim();
  const element = node.parentElement;
  if (!text || ['SCRIPT', 'STYLE', 'TITLE', 'title', 'desc'].includes(element.tagName)) continue;
  if (!element.checkVisibility({visibilityProperty: true, contentVisibilityAuto: true})) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  const box = range.getBoundingClientRect();
  if (box.width < 2 || box.height < 2) continue;
  const style = getComputedStyle(element);
  const inside = element instanceof SVGElement;
  const under = inside ? beneath(element, box) : background(element);
  const [r, g, b, a] = inside ? fill(style, 'fill', 'fillOpacity') : rgba(style.color);
  const ink = over([r, g, b, a * opacity(element)], under);
  const [low, high] = [luminance(ink), luminance(under)].sort((one, other) => one - other);
  const ratio = (high + 0.05) / (low + 0.05);
  seen += 1;
  if (ratio < least) found.push(`${ratio.toFixed(2)}: ${element.tagName}.${element.getAttribute('class')} ` +
    `"${text.slice(0, 40)}" ${ink.map(Math.round)} on ${under.map(Math.round)}`);
}
return {seen, found: [...new Set(found)].slice(0, 20)};
"""

# Parts that stick out of the page without a box of their own that scrolls.
TOO_WIDE = """
const width = document.documentElement.clientWidth;
const clipped = element => {
  for (let at = element.parentElement; at && at !== document.body; at = at.parentElement)
    if (getComputedStyle(at).overflowX !== 'visible') return true;
  return false;
};
return [...document.body.querySelectorAll('*')]
  .filter(element => element.checkVisibility() && element.getBoundingClientRect().right > width + 1)
  .filter(element => !clipped(element))
  .map(element => `${element.tagName}.${element.className} to ${element.getBoundingClientRect().right}`)
  .slice(0, 10);
"""

CONTROLS = "a[href], button, summary, input, select, textarea, [tabindex]:not([tabindex='-1'])"

# WCAG 2.2, 2.5.8: 24 by 24 CSS pixels; a link within a line of text is exempt.
SMALL_TARGETS = """
const [selector, least] = arguments;
const inline = element => element.tagName === 'A' && getComputedStyle(element).display === 'inline'
  && element.parentElement.textContent.trim() !== element.textContent.trim();
return [...document.querySelectorAll(selector)]
  .filter(element => element.checkVisibility({visibilityProperty: true}) && !inline(element))
  .map(element => [element, element.getBoundingClientRect()])
  .filter(([element, box]) => box.width < least || box.height < least)
  .map(([element, box]) => `${element.tagName} "${element.textContent.trim().slice(0, 30)}" ` +
    `${box.width.toFixed(0)} x ${box.height.toFixed(0)}`);
"""

# What Tab has just reached: its place among the controls (-1 is a box that scrolls), and whether the focus can be
# seen; null at the end of the page, or where Tab has been before.
FOCUSED = """
const element = document.activeElement;
window.reached ??= new Set();
if (!element || element === document.body || reached.has(element)) return null;
reached.add(element);
const style = getComputedStyle(element);
const ring = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 1
  && !/rgba\\(.*, 0\\)|transparent/.test(style.outlineColor);
return {
  at: [...document.querySelectorAll(arguments[0])].indexOf(element),
  name: `${element.tagName} "${element.textContent.trim().slice(0, 30)}"`,
  visible: ring || style.boxShadow !== 'none',
};
"""

VISIBLE_CONTROLS = """
return [...document.querySelectorAll(arguments[0])]
  .map((element, at) => [element, at])
  .filter(([element]) => element.checkVisibility({visibilityProperty: true}) && !element.disabled)
  .map(([element, at]) => at);
"""

# Numbers that stand right before or after a name in Arabic, and were carried to its other side: it is not isolated.
DISPLACED = """
const arabic = /[\\u0600-\\u06ff]+/g, number = /[-+]?\\d[\\d.,]*/g;
const pieces = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  if (['SCRIPT', 'STYLE', 'TITLE', 'title', 'desc'].includes(node.parentElement.tagName)) continue;
  if (!node.parentElement.checkVisibility({visibilityProperty: true})) continue;
  const line = node.parentElement.closest('p, li, td, th, dt, dd, h1, h2, h3, h4, summary, figcaption, text, div');
  for (const [kind, pattern] of [['arabic', arabic], ['number', number]])
    for (const match of node.textContent.matchAll(pattern)) {
      const range = document.createRange();
      range.setStart(node, match.index);
      range.setEnd(node, match.index + match[0].length);
      const boxes = [...range.getClientRects()];  // a word that is broken has one on each line
      if (!boxes.length) continue;
      pieces.push({kind, line, node, at: match.index, text: match[0], first: boxes[0], last: boxes.at(-1)});
    }
}
pieces.sort((a, b) => a.node === b.node ? a.at - b.at
  : a.node.compareDocumentPosition(b.node) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1);
const found = [];
const sameLine = (a, b) => a.top < b.bottom && b.top < a.bottom;
pieces.slice(1).forEach((then, i) => {
  const now = pieces[i];
  if (now.kind === then.kind || now.line !== then.line || !sameLine(now.last, then.first)) return;
  if (then.first.left < now.last.right - 1) found.push(`"${now.text}" and "${then.text}"`);
});
return found;
"""

# Text from right to left that shares its line with other text and is not set apart from it.
MIXED = """
const isolating = ['isolate', 'isolate-override', 'plaintext'];
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const text = node.textContent.trim(), element = node.parentElement;
  if (!/[\u0600-\u06ff]/.test(text) || ['SCRIPT', 'STYLE'].includes(element.tagName)) continue;
  if (element.closest('pre')) continue;  // a file as it is: what sets apart would be copied with it
  let line = element;
  while (getComputedStyle(line).display.startsWith('inline') && line.tagName !== 'text') line = line.parentElement;
  const alone = line.textContent.trim() === text;
  const apart = element !== line && isolating.includes(getComputedStyle(element).unicodeBidi);
  const marked = text.replace(/\u2068[^\u2068\u2069]*\u2069/g, '');
  if (/[\u0600-\u06ff]/.test(marked) && !(apart || (alone && !/[A-Za-z\\d]/.test(text)))) found.push(text);
}
return found;
"""
