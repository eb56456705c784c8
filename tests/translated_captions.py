"""Captions and good translations of them, in the many ways in which reports are written.

They were written by hand for these tests: free text, unlike the sample's captions. Nothing was changed by
the translation of any of them.
"""

PAIRS = [
    (
        "Axial CT of the chest in lung window shows a 1.8 cm spiculated nodule in the right upper lobe. "
        "No pleural effusion or pneumothorax.",
        "胸部轴位CT肺窗示右肺上叶一枚1.8厘米的毛刺状结节。无胸腔积液或气胸。",
    ),
    (
        "The heart is not enlarged and the lungs are clear.",
        "心脏未增大，双肺清晰。",
    ),
    (
        "Two hypodense lesions are seen in the left lobe of the liver, measuring 12 mm and 8 mm.",
        "肝左叶可见两个低密度灶，大小分别为12毫米和8毫米。",
    ),
    (
        "A 60-year-old man with a large mass in the left kidney, 7.2 x 6.5 x 5 cm.",
        "60岁男性，左肾巨大肿块，大小约7.2×6.5×5厘米。",
    ),
    (
        "MRI of the brain: a ring enhancing lesion in the right frontal lobe with surrounding edema. "
        "There is a midline shift of 5 mm to the left.",
        "脑部MRI：右侧额叶可见环形强化病灶，周围水肿。中线移位5毫米，向左偏移。",
    ),
    (
        "Chest radiograph, PA view. Bilateral pleural effusions, larger on the right.",
        "胸片，后前位。双侧胸腔积液，右侧较多。",
    ),
    (
        "Unremarkable appearance of the spleen.",
        "脾脏未见异常。",
    ),
    (
        "There is no evidence of a fracture or dislocation of the left hip.",
        "左髋骨未见骨折或脱位征象。",
    ),
    (
        "The region of interest, in the lower right of the image, covers about 2.5% of its area and "
        "shows a cyst of the right kidney.",
        "感兴趣区域位于图像的右下部，约占图像面积的2.5%，显示右肾囊肿。",
    ),
    (
        "Ground-glass opacities in both lower lobes, compatible with COVID-19 pneumonia.",
        "双肺下叶磨玻璃影，符合COVID-19肺炎。",
    ),
    (
        "Ultrasound of the gallbladder shows several stones, the largest of 9 mm, without wall thickening.",
        "胆囊超声示多发结石，最大者9毫米，胆囊壁无增厚。",
    ),
    (
        "The third ventricle is dilated; hydrocephalus cannot be excluded.",
        "第三脑室扩张；不能排除脑积水。",
    ),
    (
        "An irregular mass of the left breast, BI-RADS 5, with microcalcifications.",
        "左侧乳腺不规则肿块，BI-RADS 5类，伴微小钙化。",
    ),
    (
        "A small pneumothorax on the right, less than 1 cm.",
        "右侧少量气胸，不足1厘米。",
    ),
    (
        "Grade III glioma of the right temporal lobe.",
        "右侧颞叶Ⅲ级胶质瘤。",
    ),
    (
        "Fracture of the fifth and sixth left ribs.",
        "左侧第5、6肋骨骨折。",
    ),
    (
        "Compression fracture of L1, about one third of its height is lost.",
        "L1压缩性骨折，椎体高度丢失约1/3。",
    ),
    (
        "The endotracheal tube ends 3 cm above the carina. No pneumothorax.",
        "气管插管末端位于隆突上方3厘米。未见气胸。",
    ),
    (
        "The aorta measures 3,2 cm in diameter.",
        "主动脉直径3.2厘米。",
    ),
    (
        "About 1,200 ml of ascites around the liver and the spleen.",
        "肝脾周围腹水约1200毫升。",
    ),
    (
        "The mass has a density of -50 HU, which indicates fat.",
        "肿块密度为-50HU，提示脂肪。",
    ),
    (
        "A polyp of 5-6 mm in the sigmoid colon seen at colonoscopy.",
        "肠镜见乙状结肠5至6毫米息肉。",
    ),
    (
        "The left and right kidney are of normal size, without hydronephrosis.",
        "双肾大小正常，无肾积水。",
    ),
    (
        "The nodule is unchanged since 2019-03-05.",
        "结节自2019年3月5日以来无明显变化。",
    ),
    (
        "No acute intracranial hemorrhage. Old infarct in the left basal ganglia.",
        "未见急性颅内出血。左侧基底节陈旧性梗死。",
    ),
    (
        "Poorly defined opacity in the left lower lobe, suggestive of pneumonia; tuberculosis is less likely.",
        "左肺下叶边界不清的斑片影，提示肺炎；结核可能性较小。",
    ),
    (
        "The pancreas is not visualized because of overlying gas.",
        "因气体遮挡，胰腺显示不清。",
    ),
    (
        "Fundus photograph of the right eye with microaneurysms and hard exudates.",
        "右眼眼底照片可见微动脉瘤和硬性渗出。",
    ),
    (
        "The lesion occupies roughly 4 percent of the image.",
        "病灶约占图像面积的百分之四。",
    ),
    (
        "Inhomogeneous enhancement of the tumor, which abuts but does not invade the aorta.",
        "肿瘤强化不均匀，紧邻但未侵犯主动脉。",
    ),
    (
        "Both lungs are well expanded. No focal consolidation.",
        "两肺膨胀良好。无局灶性实变。",
    ),
    (
        "A cyst of about 2 cm in the right ovary.",
        "右侧卵巢囊肿，约2cm左右。",
    ),
    (
        "Axial CT, lower abdomen: thickening of the wall of the rectum over 6 cm, no lymphadenopathy.",
        "下腹部轴位CT：直肠壁增厚，长约6厘米，未见淋巴结肿大。",
    ),
    (
        "The device is a pacemaker. Its leads end in the right ventricle.",
        "该装置为起搏器。其电极末端位于右心室。",
    ),
    (
        "Stenosis of the left common carotid artery of 70 to 80%.",
        "左侧颈总动脉狭窄70%至80%。",
    ),
    (
        "The chest drain has been removed. The pneumothorax has resolved.",
        "引流管已拔除。气胸已消失。",
    ),
    (
        "Hematoxylin and eosin stain, x200: adenocarcinoma with necrosis.",
        "苏木精-伊红染色，×200：腺癌，伴坏死。",
    ),
    (
        "Dermoscopy: a melanoma of 0.8 mm depth, no ulceration.",
        "皮肤镜：黑色素瘤，深度0.8毫米，无溃疡。",
    ),
    (
        "Subdural hematoma on the left, up to 11 mm thick, with mass effect.",
        "左侧硬膜下血肿，最厚处11毫米，有占位效应。",
    ),
    (
        "A twelve-year-old girl. The growth plates are open.",
        "12岁女孩。骨骺未闭合。",
    ),
    (
        "The duodenum and the head of the pancreas are normal.",
        "十二指肠及胰头未见异常。",
    ),
    (
        "Disc herniation at L4-L5, more to the right.",
        "L4/5椎间盘突出，偏右侧。",
    ),
    (
        "CT of the neck: enlarged thyroid gland, the trachea is displaced to the right by 14 mm.",
        "颈部CT：甲状腺肿大，气管向右移位14毫米。",
    ),
    (
        "Three-dimensional reconstruction of the aorta without dissection.",
        "主动脉三维重建，未见夹层。",
    ),
    (
        "There is atelectasis of the left lower lobe.",
        "左肺下叶肺不张。",
    ),
]
