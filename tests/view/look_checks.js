// What cannot be read or named: texts of too little contrast, and controls without a name.
() => {
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const found = pixel(getComputedStyle(e).backgroundColor);
      if (found[3] === 255) return found;
    }
    return [255, 255, 255, 255];
  };
  const seen = (e) => e.checkVisibility({ visibilityProperty: true }) && !e.closest(".unseen, [aria-hidden=true]") && e.getClientRects().length;
  const faint = [];
  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !seen(element) || element.closest("script, style, option")) continue;
    const style = getComputedStyle(element);
    const ink = pixel(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [luminance(ink), luminance(behind(element))].sort((x, y) => y - x);
    texts++;
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(`${walker.currentNode.data.trim().slice(0, 30)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
  }
  const named = (e) => e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim() ||
    (e.getAttribute("aria-labelledby") || "").split(" ").some((id) => document.getElementById(id)?.textContent.trim());
  const controls = [...document.querySelectorAll("button, input, select, [tabindex], [role=button], [role=img], canvas:not([aria-hidden=true])")].filter(seen);
  const nameless = controls.filter((e) => !named(e) && e.id !== "grid").map((e) => e.outerHTML.slice(0, 90));
  const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const dangling = [...document.querySelectorAll("[aria-describedby], [aria-labelledby], [aria-controls], label[for]")]
    .flatMap((e) => ["aria-describedby", "aria-labelledby", "aria-controls", "for"].map((n) => e.getAttribute(n)).filter(Boolean))
    .filter((id) => !document.getElementById(id));
  return { texts, controls: controls.length, faint, nameless, twice, dangling };
}
